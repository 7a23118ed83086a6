"""The encoders give the official outputs, and refuse the models that only look the same."""

import moco_cases as cases
import numpy as np
import pytest
import timm
import torch

import mesa_train.models  # noqa: F401
from mesa_train.models.moco import sincos_position

PARAMETERS = {
    "moco_vit_small": (22_050_664, 21_679_720),
    "moco_vit_base": (86_567_656, 85_825_768),
    "moco_vit_conv_small": (21_002_392, 20_926_744),
    "moco_vit_conv_base": (82_968_904, 82_817_608),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = timm.create_model(name)
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (everything, trained) == PARAMETERS[name]
    if "small" in name:
        known = cases.keys("vit_conv_s" if "conv" in name else "vit_s")["keys"]
        assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == known


def outputs(golden, name, **options):
    model = cases.fill(timm.create_model(name, **options)).eval()
    return model, np.abs(model(cases.normal(0, 2, 3, 224, 224)).detach().numpy() - golden).max()


def test_vit_small_in_float32():
    """float32's rounding is 1.7e-6; every mistake below is far above the tolerance."""
    wanted = cases.arrays("vit_s")["logits"]
    assert outputs(wanted, "moco_vit_small")[1] < 3e-5
    for mistake, least in (
        ({"num_heads": 6}, 0.3),  # timm's and DeiT's ViT-S
        ({"act_layer": "gelu_tanh"}, 5e-4),
    ):
        assert outputs(wanted, "moco_vit_small", **mistake)[1] > least


def test_vit_small_in_float64():
    golden = cases.arrays("vit_s")
    model = cases.fill(timm.create_model("moco_vit_small")).double().eval()
    seen = {}

    def watch(name):
        return lambda module, args, out: seen.__setitem__(name, out.detach())

    for name in golden["stat_names"]:
        model.get_submodule(name).register_forward_hook(watch(name))
    logits = model(cases.normal(0, 2, 3, 224, 224).double())
    assert logits.detach().numpy() == pytest.approx(golden["logits_f64"], abs=1e-11)
    assert seen["norm"][:, 0].numpy() == pytest.approx(golden["pooled_f64"], abs=1e-11)
    for i, name in enumerate(golden["stat_names"]):
        out = seen[name]
        found = [out.mean(), out.std(correction=0), out.abs().max()]
        assert found == pytest.approx(golden["stat_mean_std_absmax"][i], abs=1e-10)
        assert out.flatten()[:8].numpy() == pytest.approx(golden["stat_first8"][i], abs=1e-10)
    r = cases.normal(1, 2, 1000, dtype=np.float64) / np.sqrt(1000)
    (logits * r.float().double()).sum().backward()
    found = cases.gradients(model)
    assert list(found) == list(golden["grad_keys"])
    norms = [g.norm().item() for g in found.values()]
    assert norms == pytest.approx(golden["grad_l2"], rel=1e-9, abs=1e-9)
    sums = [g.sum().item() for g in found.values()]
    assert sums == pytest.approx(golden["grad_sum"], rel=1e-8, abs=1e-8)


def test_positions():
    golden = cases.arrays("sincos")
    table = sincos_position((14, 14), 384)[0]
    assert table[golden["pos384_rows"]].numpy() == pytest.approx(golden["pos384"], abs=1e-6)
    assert table.double().sum(1).numpy() == pytest.approx(golden["pos384_sum"], abs=1e-4)
    squares = table.double().square().sum(1).numpy()
    assert squares == pytest.approx(golden["pos384_sumsq"], abs=1e-4)
    small = sincos_position((4, 4), 48)
    assert small.numpy() == pytest.approx(golden["pos48_grid4"], abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_position((2, 2), 6)


def test_positions_have_the_row_first_on_any_grid():
    wide = sincos_position((2, 3), 8, class_token=False)[0]
    # The second token is row 0, column 1: the row's sines are 0.
    assert wide[1, :2].tolist() == [0, 0]
    assert wide[1, 4:6].tolist() == pytest.approx([np.sin(1.0), np.sin(0.01)])
    assert wide[3, :2].tolist() == pytest.approx([np.sin(1.0), np.sin(0.01)])  # row 1, column 0


def test_initial_weights():
    model = timm.create_model("moco_vit_small")
    bounds = {
        "blocks.0.attn.qkv.weight": (6 / (384 + 384)) ** 0.5,
        "blocks.0.attn.proj.weight": (6 / (384 + 384)) ** 0.5,
        "blocks.0.mlp.fc1.weight": (6 / (384 + 1536)) ** 0.5,
        "patch_embed.proj.weight": (6 / (3 * 256 + 384)) ** 0.5,
    }
    for name, bound in bounds.items():
        weight = model.get_parameter(name)
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not model.patch_embed.proj.bias.any()
    assert not model.blocks[3].attn.qkv.bias.any()
    assert model.cls_token.std().item() == pytest.approx(1e-6, rel=0.3)
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6


def test_only_the_projection_is_frozen():
    frozen = {
        n for n, p in timm.create_model("moco_vit_tiny").named_parameters() if not p.requires_grad
    }
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    free = timm.create_model("moco_vit_tiny", stop_grad_conv1=False)
    assert {n for n, p in free.named_parameters() if not p.requires_grad} == {"pos_embed"}
    stem = timm.create_model("moco_vit_conv_small", img_size=32, depth=1)
    assert {n for n, p in stem.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_the_conv_stem():
    model = timm.create_model("moco_vit_conv_small", img_size=64, depth=1, num_classes=0)
    assert len(model.blocks) == 1
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 384)
    with pytest.raises(ValueError, match=r"takes images of \(64, 64\), got \(32, 32\)"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="multiple of 16 pixels"):
        timm.create_model("moco_vit_conv_small", img_size=72)


def test_features_of_timm():
    model = timm.create_model("moco_vit_tiny", features_only=True)
    (*_, last) = model(torch.randn(1, 3, 28, 28))
    assert last.shape == (1, 96, 4, 4)
