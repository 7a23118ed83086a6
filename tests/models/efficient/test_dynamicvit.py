"""DynamicViT of DeiT and LV-ViT against the authors' model, and the parts of its training."""

import contextlib
import dataclasses

import numpy as np
import pytest
import timm
import torch
import zoo

import mesa_train.models
from mesa_train.models.common.straight_through import gumbel_softmax, relaxed_bernoulli
from mesa_train.models.dynamicvit import load_official
from mesa_train.models.dynamicvit.losses import (
    DynamicViTLoss,
    class_distillation,
    ratio_loss,
    token_distillation,
)
from mesa_train.models.dynamicvit.masked_attention import EPS, masked_attention
from mesa_train.models.dynamicvit.predictor import Predictor

SMALL = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "num_classes": 10}


def create(name="dynamicvit_deit_s", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small(name="dynamicvit_deit_s", **options):
    return create(name, **SMALL | {"depth": 4, "predictors": (1, 2, 3)} | options)


def gumbel(stage, batch):
    return torch.from_numpy(np.random.RandomState(100 + stage).gumbel(size=(batch, 196, 2)))


@pytest.mark.parametrize(
    ("name", "keep_rate", "parameters", "of_predictors", "flops", "keys"),
    [
        ("dynamicvit_deit_256", 0.7, 10_304_942, 322_758, 1.375, 182),
        ("dynamicvit_deit_s", 0.7, 22_774_414, 723_750, 2.981, 182),
        ("dynamicvit_deit_s", 0.8, 22_774_414, 723_750, 3.463, 182),
        ("dynamicvit_deit_b", 0.7, 89_452_846, 2_885_190, 11.476, 182),
        ("dynamicvit_lvvit_s", 0.7, 26_875_574, 723_750, 4.650, 234),
        ("dynamicvit_lvvit_s", 0.5, 26_875_574, 723_750, 3.790, 234),
        ("dynamicvit_lvvit_m", 0.7, 57_115_030, 1_284_486, 8.593, 278),
    ],
)
def test_sizes_are_the_authors(name, keep_rate, parameters, of_predictors, flops, keys):
    with torch.device("meta"):
        model = create(name, keep_rate=keep_rate)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.score_predictor.parameters()) == of_predictors
    assert model.flops() / 1e9 == pytest.approx(flops, abs=5e-4)
    assert len(model.state_dict()) == keys
    assert "score_predictor.2.out_conv.4.bias" in model.state_dict()


GOLDEN = [
    ("dynamicvit", "dynamicvit_deit_256", 0.7),
    ("dynamicvit_lvvit_s", "dynamicvit_lvvit_s", 0.5),
]


@pytest.mark.parametrize(("file", "name", "keep_rate"), GOLDEN)
def test_inference_is_the_authors(file, name, keep_rate):
    reference = zoo.arrays(file)
    model = zoo.fill(create(name, keep_rate=keep_rate)).eval()
    images = zoo.images(len(reference["eval_logits"]), 224)
    with torch.no_grad():
        zoo.close(model(images), reference["eval_logits"], atol=3e-5)
        model, images = model.double(), images.double()
        zoo.close(model(images), reference["eval_logits_f64"], atol=1e-9)
        pruned = model.prune(images)
    for stage in range(3):
        assert np.array_equal(pruned.kept[stage], reference[f"eval_keep{stage}"])
        scores = reference[f"eval_score{stage}_by_token_f64"]
        scores = scores[~np.isnan(scores)].reshape(len(images), -1)
        zoo.close(pruned.scores[stage], scores, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name", "keep_rate"), GOLDEN)
def test_a_training_step_is_the_authors(file, name, keep_rate):
    reference = zoo.arrays(file)
    student = zoo.fill(create(name, keep_rate=keep_rate)).double().train()
    teacher = zoo.fill(create(name, predictors=())).double().eval()
    images = zoo.images(2, 224).double().requires_grad_()
    output = student(images, noise=[gumbel(stage, 2) for stage in range(3)])
    # The authors' masked softmax is float32 also for a float64 model.
    zoo.close(output.logits, reference["train_logits_f64"], atol=1e-6)
    shares = torch.stack([d.mean(1).flatten() for d in output.decisions])
    zoo.close(shares, reference["keep_ratio"], atol=1e-12)
    zoo.close(output.mask.sum((1, 2)), reference["final_mask_sum"], atol=0)
    tokens = output.tokens.detach()
    numbers = torch.stack([tokens.mean(), tokens.std(correction=0), tokens.abs().max()])
    zoo.close(numbers, reference["train_tokens_stat"], atol=1e-6)
    zoo.close(tokens.flatten()[:8], reference["train_tokens_first8"], atol=1e-6)
    with torch.no_grad():
        taught = teacher.teach(images)
    token_loss = "kl" if student.lv_vit else "mse"
    parts = DynamicViTLoss(student.keep_rates, token_loss=token_loss)(output, zoo.labels(2), taught)
    assert parts.total.item() == pytest.approx(float(reference["loss"]), rel=1e-6)
    zoo.close(torch.stack(parts[1:]), reference["loss_parts"], atol=1e-6)
    parts.total.backward()
    # A policy without gradient in the attention would change norms by 7 %. Another eps in the
    # predictors changes them by 3e-6 only; the scores of the inference show it.
    zoo.check_gradients(student, images, reference, rel=1e-5)


def literal_attention(q, k, v, policy, scale):
    """The authors' formula, term by term."""
    tokens = q.shape[-2]
    logits = (q @ k.transpose(-2, -1)) * scale
    keep = policy.squeeze(-1)[:, None, None, :]
    mask = keep + (1 - keep) * torch.eye(tokens, dtype=q.dtype)
    e = (logits - logits.amax(-1, keepdim=True)).exp() * mask
    return (e + EPS / tokens) / (e.sum(-1, keepdim=True) + EPS) @ v


@pytest.mark.parametrize("kept", ["some", "one", "none", "all"])
def test_masked_attention_is_the_formula_with_its_gradients(kept):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 7, 4)
    q, k, v = (torch.randn(shape, generator=generator).double() * 3 for _ in range(3))
    policy = torch.zeros(2, 7, 1).double()
    policy[:, {"some": [0, 2, 5], "one": [3], "none": [], "all": list(range(7))}[kept]] = 1
    weight = torch.randn(shape, generator=generator).double()
    results = []
    for function in (masked_attention, literal_attention):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, policy)]
        out = function(*inputs, 0.5)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for ours, literal in zip(*results, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-12)
    assert (results[0][-1] != 0).any()  # the policy has a gradient, at dropped tokens too


def test_masked_attention_has_the_right_derivatives():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 3, generator=generator).double() for _ in range(3))
    policy = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1).double()
    inputs = [t.requires_grad_() for t in (q, k, v, policy)]
    assert torch.autograd.gradcheck(lambda *t: masked_attention(*t, 0.7), inputs)


def test_straight_through_draws_are_hard_with_the_soft_gradient():
    log_p = torch.randn(3, 5, 2).double().log_softmax(-1).requires_grad_()
    noise = torch.randn(3, 5, 2).double()
    drawn = gumbel_softmax(log_p, noise)
    assert ((drawn == 0) | (drawn == 1)).all()
    assert (drawn.sum(-1) == 1).all()
    soft = (log_p + noise).softmax(-1)
    weight = torch.randn(3, 5, 2).double()
    (ours,) = torch.autograd.grad((drawn * weight).sum(), log_p)
    (expected,) = torch.autograd.grad((soft * weight).sum(), log_p)
    torch.testing.assert_close(ours, expected)
    p = torch.full((10_000,), 0.3, requires_grad=True)
    draws = relaxed_bernoulli(p)
    assert draws.mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(draws.unique(), torch.tensor([0.0, 1.0]))


def test_an_image_without_tokens_gives_finite_scores():
    predictor = Predictor(8)
    scores = predictor(torch.randn(2, 5, 8), torch.zeros(2, 5, 1))
    assert scores.isfinite().all()


def test_the_parts_of_the_loss():
    decisions = (torch.tensor([[[1.0], [1.0], [0.0], [0.0]], [[1.0], [0.0], [0.0], [0.0]]]),)
    assert ratio_loss(decisions, [0.75]).item() == pytest.approx((0.25**2 + 0.5**2) / 2)
    with pytest.raises(ValueError, match="one rate a predictor, got 2 for 1"):
        ratio_loss(decisions, [0.75, 0.5])
    logits = torch.randn(3, 5)
    assert class_distillation(logits, logits + 2).item() == pytest.approx(0, abs=1e-6)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = decisions[0]
    expected = (student - teacher)[mask.squeeze(-1) > 0.5].square().mean()
    torch.testing.assert_close(token_distillation(student, teacher, mask, "mse"), expected)
    assert token_distillation(student, teacher, 0 * mask, "kl").item() == 0
    with pytest.raises(ValueError, match="token_loss must be one of mse, kl, got 'l1'"):
        DynamicViTLoss([0.7], token_loss="l1")


@pytest.mark.parametrize("name", ["dynamicvit_deit_s", "dynamicvit_lvvit_s"])
def test_a_backbones_file_loads_and_leaves_the_predictors(tmp_path, name):
    backbone = small(name, predictors=())
    torch.save({"model": backbone.state_dict()}, tmp_path / "w.pth")
    model = zoo.fill(small(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_official(model, tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        source = before if key.startswith("score_predictor.") else backbone.state_dict()
        assert torch.equal(value, source[key]), key
    larger = small(name, img_size=96)
    load_official(larger, tmp_path / "w.pth")
    assert larger.pos_embed.shape == (1, 37, 32)
    other = small(name, num_classes=3)
    load_official(other, tmp_path / "w.pth", head=False)


def test_inference_drops_tokens_and_training_keeps_them():
    model = small(keep_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.eval()(images)
    assert seen == [17, 9, 5, 3]
    seen.clear()
    output = model.train()(images)
    assert seen == [17] * 4
    # Decisions are cumulative.
    for before, after in zip(output.decisions, output.decisions[1:], strict=False):
        assert (after <= before).all()


@pytest.mark.parametrize("name", ["dynamicvit_deit_s", "dynamicvit_lvvit_s"])
def test_checkpointed_blocks_use_the_same_decisions(name):
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = small(name)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        output = model.train()(images)
        (output.logits.square().sum() + ratio_loss(output.decisions, model.keep_rates)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.0}, "keep_rate must be above 0 and at most 1, got 0.0"),
        ({"keep_rate": 0.2}, "keep_rate=0.2 keeps no token of 16 at the last predictor"),
        ({"predictors": (2, 1)}, r"rising blocks from 0 to 3, got \(2, 1\)"),
        ({"predictors": (4,)}, r"rising blocks from 0 to 3, got \(4,\)"),
        ({"num_heads": 3}, "embed_dim must be a multiple of 4 and num_heads, got 32"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_model_with_predictors_is_no_teacher():
    with pytest.raises(RuntimeError, match=r"build it with predictors=\(\)"):
        small().teach(torch.randn(1, 3, 64, 64))


def test_registration():
    names = {"dynamicvit_deit_256", "dynamicvit_deit_s", "dynamicvit_lvvit_s", "dynamicvit_lvvit_m"}
    assert names <= set(timm.list_models("dynamicvit_*"))
    assert mesa_train.models.dynamicvit is not None


@pytest.mark.parametrize("policy", ["mesa8", "mesa8-recompute"])
def test_codes_serve_rows_that_a_dropped_token_dominates(policy):
    """A kept token's weight is 1e-4 of the dropped token's, and its gradient is as large."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 16) for _ in range(3))
    k[:, :, 0] = 6 * q.mean(2)
    q = q + 4 * k[:, :, :1]
    keep = torch.ones(2, 64, 1)
    keep[:, 0] = 0
    grad = torch.randn(2, 2, 64, 16)

    def gradients(mode):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, keep)]
        with mode:
            output = masked_attention(*leaves, 16**-0.5)
        return torch.autograd.grad(output, leaves, grad)

    expected = gradients(contextlib.nullcontext())
    rules = dataclasses.replace(mesa_train.Policy.preset(policy), min_bytes=0)
    found = gradients(mesa_train.compress(rules))
    for name, a, b in zip(("q", "k", "v", "policy"), found, expected, strict=True):
        assert (a - b).norm() / b.norm() < 0.03, name
