"""HVT against the authors' model: names, numbers, gradients; and its own options."""

import argparse

import pytest
import timm
import torch
import zoo

import mesa_train.models
from mesa_train.models.hvt import load_official


def create(name="hvt_ti_1", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small(**options):
    wanted = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 64, "num_classes": 10}
    return create("hvt_ti_1", **wanted | {"pool_after": (0, 1)} | options)


@pytest.fixture(scope="module")
def reference():
    return zoo.arrays("hvt")


@pytest.mark.parametrize(
    ("name", "parameters", "flops", "keys"),
    [
        ("hvt_ti_1", 5_735_656, 642_299_520, 152),
        ("hvt_s_0", 22_049_896, 4_574_026_752, 151),
        ("hvt_s_1", 22_087_144, 2_402_020_608, 152),
        ("hvt_s_2", 22_105_576, 1_941_216_768, 153),
        ("hvt_s_3", 22_114_408, 1_620_095_232, 154),
        ("hvt_s_4", 22_118_632, 1_393_640_448, 155),
    ],
)
def test_sizes_are_the_authors(name, parameters, flops, keys):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops() == flops
    assert len(model.state_dict()) == keys


def test_a_position_embedding_comes_before_its_block():
    names = list(small().state_dict())
    assert names[:5] == [
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "blocks.0.pos_embed",
        "blocks.0.norm1.weight",
    ]


@pytest.mark.parametrize(("prefix", "pool_after"), [("ti1_", (0,)), ("ti3_", (0, 4, 8))])
def test_logits_outputs_and_gradients_are_the_authors(reference, prefix, pool_after):
    model = zoo.fill(create(pool_after=pool_after)).eval()
    images = zoo.images(2, 224)
    with torch.no_grad():
        zoo.close(model(images), reference[f"{prefix}logits"], atol=3e-5)
    model, images = model.double(), images.double().requires_grad_()
    # In float64: eps 1e-5 instead of 1e-6 would change the logits by 1e-5 only.
    logits, seen, named = zoo.check_stats(model, lambda: model(images), reference, prefix)
    assert seen == named
    zoo.close(logits, reference[f"{prefix}logits_f64"], atol=1e-9)
    (logits * zoo.probe(2).double()).sum().backward()
    zoo.check_gradients(model, images, reference, prefix)


def test_stride_and_kernel_of_the_pooling():
    model = small(pool_stride=3, pool_kernel=4)
    assert model.tokens == [16, 5, 1, 1]
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_a_pooling_takes_the_largest_of_overlapping_windows_and_drops_the_last_token():
    block = small().blocks[0]
    x = torch.randn(1, 16, 32)
    pooled = block.downsample(x.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(pooled, torch.stack([x[:, 2 * t : 2 * t + 3].amax(1) for t in range(7)], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_after": (3,)}, r"pool_after must be blocks from 0 to 2, got \(3,\)"),
        ({"num_heads": 5}, "num_heads must divide embed_dim 32, got 5"),
        ({"img_size": 60}, "multiple of the patch size 16, got 60x60"),
        ({"pool_after": (0, 1, 2), "img_size": 48}, "block 2 has 1 tokens, fewer than .* 3"),
        ({"global_pool": "token"}, "global_pool must be 'avg' or '', got 'token'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="takes images of 64x64, got 32x64; set img_size"):
        small()(torch.randn(1, 3, 32, 64))


def test_the_heads_interface_is_timms():
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    assert model.forward_features(images).shape == (2, 3, 32)
    model.reset_classifier(0)
    assert model(images).shape == (2, 32)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 3, 32)
    model.reset_classifier(5, "avg")
    assert model(images).shape == (2, 5)
    assert model.no_weight_decay() == {
        "pos_embed",
        "blocks.0.pos_embed",
        "blocks.1.pos_embed",
    }


def test_checkpointed_blocks_give_the_same_gradients():
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_the_authors_files_load_at_this_and_at_another_size(tmp_path):
    model = small()
    state = {"model": model.state_dict(), "epoch": 299, "args": argparse.Namespace(lr=1e-3)}
    torch.save(state, tmp_path / "w.pth")
    other = zoo.fill(small())
    with pytest.raises(ValueError, match="allow_config=True"):
        load_official(other, tmp_path / "w.pth")
    load_official(other, tmp_path / "w.pth", allow_config=True)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    larger = small(img_size=96)
    load_official(larger, tmp_path / "w.pth", allow_config=True)
    assert larger.blocks[0].pos_embed.shape == (1, 17, 32)
    # Constant rows stay constant when they are resampled.
    with torch.no_grad():
        for name in ("pos_embed", "blocks.0.pos_embed", "blocks.1.pos_embed"):
            model.get_parameter(name).copy_(torch.arange(32.0).expand(1, 1, -1))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_official(larger, tmp_path / "w.pth")
    for name in ("pos_embed", "blocks.0.pos_embed", "blocks.1.pos_embed"):
        expected = torch.arange(32.0).expand_as(larger.get_parameter(name))
        torch.testing.assert_close(larger.get_parameter(name).detach(), expected)


def test_a_file_of_another_variant_is_refused(tmp_path):
    torch.save(small(pool_after=(0,)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.pos_embed"):
        load_official(small(), tmp_path / "w.pth")


def test_registration():
    assert {"hvt_ti_1", *(f"hvt_s_{i}" for i in range(5))} <= set(timm.list_models("hvt_*"))
    assert mesa_train.models.hvt is not None
