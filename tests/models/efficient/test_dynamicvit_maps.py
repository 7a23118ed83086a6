"""DynamicViT of ConvNeXt and Swin against the authors' model, and the parts of its two paths."""

import numpy as np
import pytest
import timm
import torch
import zoo

from mesa_train.models.dynamicvit import load_official
from mesa_train.models.dynamicvit.losses import DynamicViTLoss
from mesa_train.models.dynamicvit.maps import by_position, map_keep_rates

SMALL = {
    "dynamicvit_convnext_t": {"widths": (8, 16, 32, 32), "depths": (1, 1, 4, 1)},
    "dynamicvit_swin_t": {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 4, 1)},
}
NAMES = list(SMALL)
RULES = {"gamma": lambda z: 0.3 + 0.1 * z}


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small(name, **options):
    if "swin" in name:
        options = {"window_size": 2, **options}
    return create(name, **SMALL[name] | {"img_size": 64, "num_classes": 10} | options)


def gumbel(stage, name):
    # The authors' ConvNeXt has the two channels before the positions.
    shape = (1, 2, 196) if "convnext" in name else (1, 196, 2)
    noise = torch.from_numpy(np.random.RandomState(100 + stage).gumbel(size=shape))
    return noise.transpose(1, 2) if "convnext" in name else noise


@pytest.mark.parametrize(
    ("name", "keep_rate", "parameters", "of_fast_paths", "flops"),
    [
        ("dynamicvit_convnext_t", 0.7, 30_504_814, 1_191_936, 3.579),
        ("dynamicvit_convnext_t", 0.9, 30_504_814, 1_191_936, 3.908),
        ("dynamicvit_convnext_s", 0.7, 54_523_246, 3_575_808, 5.771),
        ("dynamicvit_convnext_s", 0.9, 54_523_246, 3_575_808, 6.759),
        ("dynamicvit_convnext_b", 0.7, 96_216_558, 6_340_608, 10.177),
        ("dynamicvit_convnext_b", 0.9, 96_216_558, 6_340_608, 11.934),
        ("dynamicvit_swin_t", 0.7, 29_755_144, 743_040, 4.041),
        ("dynamicvit_swin_s", 0.7, 52_707_736, 2_377_728, 6.846),
        ("dynamicvit_swin_b", 0.7, 93_271_590, 4_218_880, 12.063),
    ],
)
def test_sizes_are_the_authors(name, keep_rate, parameters, of_fast_paths, flops):
    with torch.device("meta"):
        model = create(name, keep_rate=keep_rate)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for k, p in model.named_parameters() if "fast" in k) == of_fast_paths
    assert model.flops() / 1e9 == pytest.approx(flops, abs=6e-4)


@pytest.mark.parametrize("name", NAMES)
def test_inference_is_the_authors(name):
    reference = zoo.arrays(name)
    model = zoo.fill(create(name), RULES).eval()
    images = zoo.images(1, 224)
    with torch.no_grad():
        zoo.close(model(images), reference["eval_logits"], atol=3e-5)
        model, images = model.double(), images.double()
        pruned = model.prune(images)
        zoo.close(model(images), reference["eval_logits_f64"], atol=1e-9)
    for stage in range(3):
        zoo.close(pruned.scores[stage], reference[f"eval_score{stage}_f64"], atol=1e-9)
        assert np.array_equal(
            pruned.kept[stage].flatten(), reference[f"eval_keep{stage}"].flatten()
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_the_authors(name):
    reference = zoo.arrays(name)
    student = zoo.fill(create(name), RULES).double().train()
    teacher = zoo.fill(create(name, predictors=()), RULES).double().eval()
    images = zoo.images(1, 224).double().requires_grad_()
    output = student(images, noise=[gumbel(stage, name) for stage in range(3)])
    zoo.close(output.logits, reference["train_logits_f64"], atol=1e-9)
    shares = torch.stack([d.mean(1).flatten() for d in output.decisions])
    zoo.close(shares, reference["keep_ratio"], atol=1e-12)
    tokens = output.tokens.detach()
    numbers = torch.stack([tokens.mean(), tokens.std(correction=0), tokens.abs().max()])
    zoo.close(numbers, reference["train_tokens_stat"], atol=1e-9)
    with torch.no_grad():
        taught = teacher.teach(images)
    parts = DynamicViTLoss(student.keep_rates, 10.0)(output, zoo.labels(1), taught)
    assert parts.total.item() == pytest.approx(float(reference["loss"]), rel=1e-10)
    zoo.close(torch.stack(parts[1:]), reference["loss_parts"], atol=1e-10)
    parts.total.backward()
    zoo.check_gradients(student, images, reference)


def test_ratios_keep_the_authors_rounding():
    assert [int(196 * rate) for rate in map_keep_rates(0.7, 3)] == [137, 97, 58]
    with pytest.raises(ValueError, match=r"keep_rate must be above 0\.4 and at most 1, got 0\.4"):
        map_keep_rates(0.4, 3)


def test_two_functions_run_at_their_positions():
    x = torch.arange(12.0).view(1, 6, 2)
    slow, fast = torch.tensor([[0, 3, 4]]), torch.tensor([[1, 2, 5]])
    out = by_position(x, slow, fast, lambda t: 2 * t, lambda t: -t)
    factor = torch.tensor([2.0, -1, -1, 2, 2, -1]).view(1, 6, 1)
    assert torch.equal(out, factor * x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_training_with_one_decision_is_the_inference(name, batch):
    # With one predictor no position changes from the fast to the slow path.
    model = zoo.fill(small(name, predictors=(1,)), RULES).eval()
    images = torch.randn(batch, 3, 64, 64)
    with torch.no_grad():
        pruned = model.prune(images)
        noise = torch.tensor([-1e4, 0.0]).repeat(batch, 16, 1)
        noise[..., 0].scatter_(1, pruned.kept[0], 1e4)
        logits = model(images)
        output = model.train()(images, noise=[noise])
    assert output.decisions[0].sum(1).flatten().tolist() == model.counts * batch
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_backbones_file_loads_and_leaves_the_rest(tmp_path, name):
    backbone = small(name, predictors=())
    torch.save({"model": backbone.state_dict()}, tmp_path / "w.pth")
    model = zoo.fill(small(name), RULES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_official(model, tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        new = "score_predictor" in key or "fast" in key
        assert torch.equal(value, before[key] if new else backbone.state_dict()[key]), key
    with pytest.raises(RuntimeError, match=r"build it with predictors=\(\)"):
        model.teach(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = zoo.fill(small(name), RULES).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        output = model(images)
        output.logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.3}, "keep_rate must be above 0.4 and at most 1, got 0.3"),
        ({"predictors": (1, 4)}, r"rising blocks from 0 to 3, got \(1, 4\)"),
        ({"depths": (1, 1, 1)}, "depths must have 4 entries, got"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)


def test_registration():
    names = {f"dynamicvit_{family}_{size}" for family in ("convnext", "swin") for size in "tsb"}
    assert names <= set(timm.list_models("dynamicvit_*"))
