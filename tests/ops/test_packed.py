"""q, k and v in one projection's output: coded in one pass, with the codes that each has alone."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch.utils._python_dispatch import TorchDispatchMode

from mesa_train import Policy, compress
from mesa_train.stash.recorder import Recorder

B, H, N, D = 2, 3, 17, 16


class Encodings(TorchDispatchMode):
    """Names of the operators that made codes, and how many parts each coded."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("mesa_train::")
        if name.startswith("affine_encode"):
            self.seen.append(args[1] if name == "affine_encode_parts" else 1)
        return func(*args, **(kwargs or {}))


def packed():
    """q, k and v (B, H, N, D) as timm cuts them from one projection, which needs a gradient."""
    seed_torch(0)
    source = torch.randn(B, N, 3 * H * D).requires_grad_()
    return source, (source * 1).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def attend(policy, change=lambda q, k, v: (q, k, v)):
    """(how many parts each encoding had, output, gradient, report) of attention under a policy."""
    source, (q, k, v) = packed()
    encodings = Encodings()
    with compress(policy) as mode, encodings:
        output = F.scaled_dot_product_attention(*change(q, k, v))
    (grad,) = torch.autograd.grad(output.square().sum(), source)
    return encodings.seen, output, grad, mode.recorder.report.rows


def one_by_one(monkeypatch):
    monkeypatch.setattr(Recorder, "new_codes", lambda *args: None)


QK8 = {"attention.q": {"bits": 8}, "attention.k": {"bits": 8}}


# Parts of each pass that made codes, the attention's output the last.
@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (Policy(min_bytes=0), [3, 1]),
        (Policy(min_bytes=0, bits=4), [3, 1]),
        (Policy(min_bytes=0, bits=4, overrides=QK8), [2, 1, 1]),
        (Policy(min_bytes=0, overrides={"attention.k": {"enabled": False}}), [1, 1, 1]),
        (Policy(min_bytes=0, ranges="running"), []),
    ],
)
def test_one_pass_keeps_what_one_after_another_keep(monkeypatch, policy, parts):
    seen, output, grad, rows = attend(policy)
    assert seen == parts
    one_by_one(monkeypatch)
    alone, *expected = attend(policy)
    assert all(n == 1 for n in alone)
    assert torch.equal(output, expected[0])
    assert torch.equal(grad, expected[1])
    assert rows == expected[2]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        # Normalised q and k leave v alone.
        (lambda q, k, v: (F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v), [1, 1]),
        (lambda q, k, v: (v, k, q), [1, 1, 1, 1]),
        (lambda q, k, v: (k, v, q), [2, 1, 1]),
        (lambda q, k, v: (q, q, k), [2, 1]),
        (lambda q, k, v: (q, k, v[..., :8]), [2, 1, 1]),
        (lambda q, k, v: (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]), [1, 1, 1, 1]),
        (lambda q, k, v: (q.contiguous(), k.contiguous(), v), [1, 1, 1, 1]),
        # Heads outside the rows: what follows q's columns is another head of q's.
        (lambda q, k, v: (q[:, :1], k[:, :1], v[:, :1]), [1, 1, 1, 1]),
    ],
)
def test_what_is_not_side_by_side_is_coded_alone(monkeypatch, change, parts):
    policy = Policy(min_bytes=0)
    seen, output, grad, _ = attend(policy, change)
    assert seen == parts
    one_by_one(monkeypatch)
    _, expected, expected_grad, _ = attend(policy, change)
    assert torch.equal(output, expected)
    assert torch.equal(grad, expected_grad)
