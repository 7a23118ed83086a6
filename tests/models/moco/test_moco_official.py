"""Official checkpoints: what loads, and what only looks as if it did."""

import moco_cases as cases
import pytest
import timm
import torch

import mesa_train.models  # noqa: F401
from mesa_train.models.moco import MoCo, load_official, read_official


def encoder(**changes):
    return timm.create_model("moco_vit_tiny", **{"num_heads": 12, "depth": 2} | changes)


def moco():
    return MoCo(encoder(), dim=8, hidden=16)


@pytest.fixture
def pretrained(tmp_path):
    model = cases.fill(moco())
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.predictor.parameters())
    torch.save(
        {
            "epoch": 300,
            "arch": "vit_small",
            "state_dict": weights,
            "optimizer": optimizer.state_dict(),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        },
        tmp_path / "vit.pth.tar",
    )
    return model, tmp_path / "vit.pth.tar"


def test_a_whole_checkpoint_loads(pretrained):
    model, path = pretrained
    other = moco()
    load_official(other, path)
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert all(not k.startswith("module.") for k in read_official(path))


@pytest.mark.parametrize("which", ["base", "momentum"])
def test_a_vit_gets_the_trunk_and_keeps_its_classifier(pretrained, which):
    model, path = pretrained
    vit = encoder(num_classes=7)
    head = vit.head.weight.clone()
    load_official(vit, path, encoder=which)
    source = getattr(model, f"{which}_encoder")
    x = torch.randn(2, 3, 28, 28)
    wanted = model.eval().features(source, x)
    assert torch.equal(vit.eval().forward_head(vit.forward_features(x), pre_logits=True), wanted)
    assert torch.equal(vit.head.weight, head)


def test_a_linear_evaluation_loads_with_its_classifier(tmp_path):
    vit = cases.fill(encoder(num_classes=10))
    weights = {f"module.{k}": v for k, v in vit.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "linear.pth.tar")
    same, other = encoder(num_classes=10), encoder(num_classes=3)
    for model in (same, other):
        load_official(model, tmp_path / "linear.pth.tar")
    assert torch.equal(same.head.weight, vit.head.weight)
    assert other.head.weight.shape == (3, 96)
    assert torch.equal(other.norm.weight, vit.norm.weight)
    with pytest.raises(ValueError, match="has no momentum encoder"):
        load_official(same, tmp_path / "linear.pth.tar", encoder="momentum")


def test_another_image_size_has_its_own_positions(pretrained):
    _, path = pretrained
    large = encoder(img_size=56)
    table = large.pos_embed.clone()
    load_official(large, path)
    assert torch.equal(large.pos_embed, table)


def same_shapes(**changes):
    """timm's own ViT with the shapes of the encoder."""
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    given = {
        "img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 2, "num_heads": 12,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
    }  # fmt: skip
    return VisionTransformer(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6}, "6 attention heads and the checkpoint's has 12"),
        ({"norm_layer": torch.nn.LayerNorm}, "eps 1e-05, and the checkpoint's 1e-06"),
        ({"global_pool": "avg", "fc_norm": False}, "pools by 'avg'"),
    ],
)
def test_models_that_only_look_the_same_are_refused(pretrained, changes, message):
    _, path = pretrained
    load_official(same_shapes(), path)
    wrong = same_shapes(**changes)
    before = wrong.norm.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_official(wrong, path)
    assert torch.equal(wrong.norm.weight, before)


def test_other_files_are_refused_and_change_nothing(pretrained, tmp_path):
    _, path = pretrained
    deep = encoder(depth=3)
    before = deep.norm.weight.clone()
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.norm1\.weight.* and 8 more"):
        load_official(deep, path)
    assert torch.equal(deep.norm.weight, before)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "no.pth")
    with pytest.raises(ValueError, match="under 'state_dict'"):
        load_official(deep, tmp_path / "no.pth")
    with pytest.raises(ValueError, match="one of base, momentum, got 'ema'"):
        load_official(deep, path, encoder="ema")


@pytest.mark.parametrize("classes", [7, 0])
def test_a_resnet_gets_the_trunk_without_the_projector(tmp_path, classes):
    """Its classifier and its projector have the name fc."""
    model = cases.fill(
        MoCo(
            timm.create_model("resnet10t"),
            dim=8,
            hidden=16,
            projector_layers=2,
            predictor_norm=False,
        )
    )
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "r.pth.tar")
    network = timm.create_model("resnet10t", num_classes=classes)
    head = {k: v.clone() for k, v in network.state_dict().items() if k.startswith("fc.")}
    load_official(network, tmp_path / "r.pth.tar")
    own = network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in head.items())
    for key, value in model.base_encoder.state_dict().items():
        assert key.startswith("fc.") or torch.equal(own[key], value), key


def test_learned_positions_of_another_image_size_are_resampled(tmp_path):
    """The fixed table follows from the grid; learned positions do not."""
    small = cases.fill(same_shapes())
    small.pos_embed.data.fill_(0.5)
    torch.save({"state_dict": small.state_dict()}, tmp_path / "learned.pth")
    large = same_shapes(img_size=56)
    load_official(large, tmp_path / "learned.pth")
    assert large.pos_embed.shape == (1, 1 + 64, 96)
    torch.testing.assert_close(large.pos_embed, torch.full_like(large.pos_embed, 0.5))
