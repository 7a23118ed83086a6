"""Cases of losses: one call, and losses behind the operators that losses follow in models."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, parameter, positive


def _classes(*shape):
    """Class indices below 5, some of them ignored."""
    indices = torch.randint(0, 5, shape)
    return indices.masked_fill(torch.rand(shape) < 0.3, -100)


def _shares(*shape):
    """Probabilities of classes in the second dim."""
    return torch.randn(*shape).softmax(1)


LOGITS = activation(6, 5)
IMAGE = activation(2, 5, 3, 4)
CLASSES = constant(6, make=_classes, cast=False)
PIXELS = constant(2, 3, 4, make=_classes, cast=False)
WEIGHTS = constant(5, make=positive)
SHARES = constant(6, 5, make=_shares)
REDUCTIONS = ("mean", "sum", "none")


def _cross_entropy():
    for reduction in REDUCTIONS:
        yield Case(
            f"cross_entropy {reduction}",
            lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r),
            (LOGITS, CLASSES),
        )
        yield Case(
            f"cross_entropy with smoothing and weights, {reduction}",
            lambda x, t, w, r=reduction: F.cross_entropy(x, t, w, label_smoothing=0.2, reduction=r),
            (LOGITS, CLASSES, WEIGHTS),
        )
        yield Case(
            f"cross_entropy of soft targets, {reduction}",
            lambda x, t, w, r=reduction: F.cross_entropy(x, t, w, label_smoothing=0.2, reduction=r),
            (LOGITS, SHARES, WEIGHTS),
        )
    yield Case(
        "cross_entropy of an image",
        lambda x, t: F.cross_entropy(x, t, ignore_index=1),
        (IMAGE, constant(2, 3, 4, make=lambda *s: torch.randint(0, 5, s), cast=False)),
    )
    yield Case(
        "cross_entropy of an image with weights",
        lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1),
        (IMAGE, PIXELS, WEIGHTS),
    )
    yield Case(
        "cross_entropy of soft targets of an image",
        F.cross_entropy,
        (IMAGE, constant(2, 5, 3, 4, make=_shares)),
    )
    yield Case(
        "cross_entropy of a linear",
        lambda x, w, t: F.cross_entropy(F.linear(x, w), t, label_smoothing=0.1),
        (activation(6, 8), parameter(5, 8), CLASSES),
        eight=0.05,
    )
    yield Case(
        "cross_entropy with smoothing",
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
        (LOGITS, CLASSES),
    )
    yield Case(
        "cross_entropy of trained targets",
        lambda x, y: F.cross_entropy(x, y.softmax(1)),
        (LOGITS, activation(6, 5)),
    )


def _elementwise():
    pair = (activation(3, 9), activation(3, 9))
    shares = constant(3, 9, make=lambda *s: torch.rand(*s).round())
    for reduction in REDUCTIONS:
        for name, function in [
            ("mse_loss", F.mse_loss),
            ("l1_loss", F.l1_loss),
            (
                "smooth_l1_loss",
                lambda x, y, reduction: F.smooth_l1_loss(x, y, None, None, reduction, 0.7),
            ),
            ("huber_loss", lambda x, y, reduction: F.huber_loss(x, y, reduction, 0.8)),
        ]:
            yield Case(
                f"{name} {reduction}",
                lambda x, y, f=function, r=reduction: f(x, y, reduction=r),
                pair,
            )
        yield Case(
            f"binary_cross_entropy_with_logits {reduction}",
            lambda x, y, r=reduction: F.binary_cross_entropy_with_logits(x, y, reduction=r),
            (activation(3, 9), shares),
        )
    yield Case("mse_loss of a constant", F.mse_loss, (activation(3, 9), constant(3, 9)))
    yield Case("l1_loss of a constant", F.l1_loss, (activation(3, 9), constant(3, 9)))
    yield Case(
        "binary_cross_entropy_with_logits with weights",
        lambda x, y, w, p: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=p),
        (
            activation(3, 9),
            constant(3, 9, make=torch.rand),
            constant(3, 1, make=positive),
            constant(9, make=positive),
        ),
    )
    yield Case("logsigmoid", F.logsigmoid, (activation(3, 9, make=lambda *s: 4 * torch.randn(*s)),))


def _contrastive():
    """Scores of all pairs: CLIP, and SigLIP with its labels."""
    sides = (activation(12, 6), activation(12, 6), parameter(1))
    clip = torch.arange(12)

    def pairs(x, y, t):
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return x, y, (3 + t).exp()

    def normalised(x, y, t):
        x, y, t = pairs(x, y, 0.2 * t)
        scores = t * x @ y.T
        return F.cross_entropy(scores, clip) + F.cross_entropy(scores.T, clip)

    def sigmoid(x, y, t, labels):
        x, y, t = pairs(x, y, 0.2 * t)
        return -F.logsigmoid(labels(x) * (x @ y.T * t + t - 23)).sum()

    # Rebuilt scores contain the codes of both sides, times a factor of 20.
    loose = {"eight": 0.1, "four": 1.5}
    yield Case("CLIP loss", normalised, sides, **loose)
    for name, labels in [
        ("2 * eye - 1", lambda x: 2 * torch.eye(12, dtype=x.dtype) - 1),
        (
            "-ones + 2 * eye",
            lambda x: 2 * torch.eye(12, dtype=x.dtype) + -torch.ones((12, 12), dtype=x.dtype),
        ),
        (
            "2 * eye - ones",
            lambda x: 2 * torch.eye(12, dtype=x.dtype) - torch.ones_like(x @ x.T.detach()).detach(),
        ),
    ]:
        yield Case(
            f"SigLIP loss, {name}", lambda x, y, t, f=labels: sigmoid(x, y, t, f), sides, **loose
        )


def _log_softmax():
    x = activation(3, 4, 9)
    target = constant(3, 4, 9, make=lambda *s: torch.randn(*s).softmax(-1))
    for name, function, inputs in [
        ("log_softmax", lambda x: F.log_softmax(x, -1), (x,)),
        ("log_softmax of the first dim", lambda x: torch.log_softmax(x, 0), (x,)),
        (
            "log_softmax of a linear",
            lambda x, w: F.linear(x, w).log_softmax(-1),
            (x, parameter(12, 9)),
        ),
        ("log_softmax in a wider dtype", lambda x: F.log_softmax(x, 1, dtype=torch.float64), (x,)),
        ("target * log_softmax", lambda x, t: t * x.log_softmax(-1), (x, target)),
        (
            "target * log_softmax, summed",
            lambda x, t: (-t * (x / 0.5).log_softmax(-1)).sum(-1),
            (x, target),
        ),
        (
            "log_softmax * target, all summed",
            lambda x, t: torch.sum(x.log_softmax(1) * t),
            (x, target),
        ),
        (
            "target * log_softmax, two dims summed",
            lambda x, t: torch.sum(t * x.log_softmax(1), dim=(0, 1), keepdim=True),
            (x, target),
        ),
        (
            "target * log_softmax, another dim summed",
            lambda x, t: torch.sum(t * x.log_softmax(1), dim=0),
            (x, target),
        ),
        (
            "one log_softmax, two targets",
            lambda x, t: sum(
                (t.roll(n, 0) * y).sum(-1) for y in [x.log_softmax(-1)] for n in (0, 1)
            ),
            (x, target),
        ),
        (
            "log_softmax * trained target",
            lambda x, y: (x.log_softmax(-1) * y.softmax(-1)).sum(-1),
            (x, activation(3, 4, 9)),
        ),
        (
            "a product that is used twice",
            lambda x, t: (lambda p: (p.sum(-1), p.square()))(t * x.log_softmax(-1)),
            (x, target),
        ),
        (
            "kl_div of trained targets",
            lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="sum"),
            (x, activation(3, 4, 9)),
        ),
        (
            "kl_div of no log_softmax",
            lambda x, t: F.kl_div(x, t, reduction="batchmean"),
            (x, target),
        ),
        (
            "kl_div of logarithms",
            lambda x, t: F.kl_div(x.log_softmax(-1), t.log(), reduction="sum", log_target=True),
            (x, target),
        ),
        *[
            (
                f"kl_div {reduction}",
                lambda x, t, r=reduction: F.kl_div(x.log_softmax(-1), t, reduction=r),
                (x, target),
            )
            for reduction in ("sum", "none", "batchmean")
        ],
    ]:
        yield Case(name, function, inputs, eight=0.04, four=0.6)


LOSSES = [*_cross_entropy(), *_elementwise(), *_contrastive(), *_log_softmax()]
