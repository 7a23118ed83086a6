"""LIT, the first version: sizes, positions, timm's interface. Its authors' outputs are not at hand."""

import pytest
import timm
import torch
from one_step import Step

import mesa_train
import mesa_train.models
from mesa_train.models.lit.lit_ti import resize_positions
from mesa_train.models.lit.litv1 import RelativeAttention, resize_biases


def small(**options):
    options = {"img_size": 64, "width": 32, "num_heads": (1, 2, 4, 8), "num_classes": 10} | options
    return timm.create_model("lit_s", **options)


def tiny(**options):
    sizes = {"widths": (16, 32, 64, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}
    return timm.create_model("lit_ti", num_classes=10, **{"img_size": 64} | sizes | options)


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("lit_ti", 19_886_272, None),
        ("lit_s", 27_973_720, 4.082),
        ("lit_m", 49_372_264, 8.599),
        ("lit_b", 87_292_384, 15.037),
    ],
)
def test_sizes_are_the_authors(name, parameters, giga):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if giga is not None:
        assert model.flops() / 1e9 == pytest.approx(giga, abs=5e-4)


def test_names_are_the_authors():
    keys = list(small().state_dict())
    attn = [k for k in keys if k.startswith("layers.2.blocks.0.attn.")]
    assert [k.removeprefix("layers.2.blocks.0.attn.") for k in attn] == [
        "relative_position_bias_table",
        "relative_position_index",
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    ]
    assert not any("dwconv" in k for k in keys)
    assert not any("attn" in k for k in keys if k.startswith(("layers.0", "layers.1")))


def test_attention_is_swins_in_one_window():
    from timm.models.swin_transformer import WindowAttention

    relative, swin = RelativeAttention(32, 4, (3, 5)), WindowAttention(32, 4, window_size=(3, 5))
    swin.load_state_dict(
        {k: v for k, v in relative.state_dict().items() if k != "relative_position_index"}
    )
    assert torch.equal(relative.relative_position_index, swin.relative_position_index)
    x = torch.randn(2, 3, 5, 32)
    torch.testing.assert_close(relative(x).flatten(1, 2), swin(x.flatten(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, tiny])
@pytest.mark.parametrize("policy", ["mesa8", "mesa4-recompute"])
def test_it_trains_in_less_memory(make, policy):
    model = make(drop_path_rate=0.0)
    images = torch.randn(8, 3, 64, 64)
    step = Step(model, images, torch.arange(8))
    loss, expected = step()
    bf16 = {"autocast": torch.bfloat16, "fake": True}
    plain = mesa_train.footprint(model, images, **bf16).saved_bytes
    mesa_train.wrap(model, policy)
    wrapped_loss, gradient = step()
    assert torch.equal(wrapped_loss, loss)
    assert (gradient - expected).norm() < (0.03 if policy == "mesa8" else 0.5) * expected.norm()
    saved = mesa_train.footprint(model, images, **bf16).saved_bytes
    assert plain > 2.5 * saved


@pytest.mark.parametrize("make", [small, tiny])
def test_another_image_size_is_one_clear_error(make):
    with pytest.raises(ValueError, match="set img_size"):
        make()(torch.randn(1, 3, 96, 96))


def test_biases_of_another_size_are_the_resized_tables():
    torch.manual_seed(0)
    attention = RelativeAttention(12, 3, (4, 6), resized=True)
    # Without resizing, the windows of the table are what the index gathers.
    index = attention.relative_position_index.flatten()
    gathered = attention.relative_position_bias_table[index].view(24, 24, 3).permute(2, 0, 1)
    assert torch.equal(attention._resized_bias(4, 6)[0], gathered)
    # A model that is built for the larger map, with the table resized by hand.
    larger = RelativeAttention(12, 3, (7, 5))
    table = attention.relative_position_bias_table.T.reshape(1, 3, 7, 11)
    table = torch.nn.functional.interpolate(table, (13, 9), mode="bicubic")
    weights = attention.state_dict() | {
        "relative_position_bias_table": table.flatten(2)[0].T,
        "relative_position_index": larger.relative_position_index,
    }
    larger.load_state_dict(weights)
    x = torch.randn(2, 7, 5, 12)
    assert torch.equal(attention(x), larger(x))
    attention(x).sum().backward()
    assert attention.relative_position_bias_table.grad.abs().max() > 0


def test_any_image_size_with_dynamic_img_size():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    model, dynamic = small().eval(), small(dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    assert torch.equal(dynamic(images), model(images))
    assert dynamic(torch.randn(1, 3, 97, 130)).shape == (1, 10)
    dynamic = tiny(dynamic_img_size=True, global_pool="avg").eval()
    dynamic.load_state_dict(resize_positions(tiny().state_dict(), dynamic))
    assert dynamic.no_weight_decay() == set()
    maps = [tuple(x.shape[1:3]) for x in dynamic.stages(torch.randn(1, 3, 97, 130))]
    assert maps == [(25, 33), (12, 16), (6, 8), (3, 4)]
    assert dynamic(torch.randn(1, 3, 97, 130)).shape == (1, 10)
    with pytest.raises(ValueError, match="images must be at least 29x29, got 20x64"):
        dynamic(torch.randn(1, 3, 20, 64))
    with pytest.raises(ValueError, match='has no class token; use global_pool="avg"'):
        tiny(dynamic_img_size=True)(images)


def test_positions_are_resized_bilinearly_and_stage_4_has_no_class_token():
    """Of LIT-Ti: at `img_size`, only the class token of stage 4 is missing."""
    torch.manual_seed(0)
    model, dynamic = (
        tiny(features_only=True).eval(),
        tiny(features_only=True, dynamic_img_size=True),
    )
    weights = {k: v for k, v in model.state_dict().items() if "cls_token" not in k}
    dynamic.eval().load_state_dict(weights)
    images = torch.randn(1, 3, 64, 64)
    ours, theirs = dynamic(images), model(images)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    assert not torch.equal(ours[3], theirs[3])
    larger = tiny(img_size=(96, 64), features_only=True, dynamic_img_size=True).eval()
    for key, value in weights.items():
        if "pos_embed" in key:
            # Slots of the class token stay out.
            prefix, side = int("embed4" in key), 64 // 4 // 2 ** (int(key[-1]) - 1)
            maps = value[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            size = (side * 3 // 2, side)
            maps = torch.nn.functional.interpolate(maps, size, mode="bilinear")
            tokens = maps.permute(0, 2, 3, 1).flatten(1, 2)
            weights[key] = torch.cat([value[:, :prefix], tokens], 1)
    larger.load_state_dict(weights)
    images = torch.randn(1, 3, 96, 64)
    for a, b in zip(dynamic(images), larger(images), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_move_to_other_sizes():
    model, larger = small(), small(img_size=(96, 64))
    larger.load_state_dict(resize_biases(model.state_dict(), larger))
    assert larger(torch.randn(1, 3, 96, 64)).shape == (1, 10)
    same = resize_biases(model.state_dict(), model)
    assert all(torch.equal(v, same[k]) for k, v in model.state_dict().items())
    model, larger = tiny(), tiny(img_size=96)
    larger.load_state_dict(resize_positions(model.state_dict(), larger))
    assert torch.equal(larger.pos_embed4[:, 0], model.pos_embed4[:, 0])
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 10)


@pytest.mark.parametrize(
    ("make", "widths"), [(small, [32, 64, 128, 256]), (tiny, [16, 32, 64, 64])]
)
def test_timms_interface(make, widths):
    model = make().eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    maps = make(features_only=True).eval()(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, width, side, side) for width, side in zip(widths, (16, 8, 4, 2), strict=True)
    ]
    assert len(make(features_only=True, out_indices=(1, 2))(images)) == 2
    model.reset_classifier(3)
    assert model.get_classifier() is model.head
    assert model(images).shape == (2, 3)
    model.set_grad_checkpointing()
    model.train()(images).sum().backward()


def test_what_is_not_decayed():
    assert tiny().no_weight_decay() == {"cls_token"}
    names = small().no_weight_decay()
    assert len(names) == 8
    assert all(name.endswith("attn.relative_position_bias_table") for name in names)
