"""Frozen stages and batch norms: no gradient, nothing saved, evaluation mode in training."""

import pytest
import scenes
import timm
import torch
from torch import nn

import mesa_train
from mesa_train.models.dense import freeze_batch_norms, freeze_stages, plain_vit, retinanet


def resnet():
    return timm.create_model("resnet18", features_only=True)


def litv2():
    return timm.create_model("litv2_tiny", features_only=True)


def trained(body):
    return {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}


def swin():
    from transformers import SwinBackbone, SwinConfig

    config = SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4)
    return SwinBackbone(config)


@pytest.mark.parametrize(
    ("make", "count", "left"),
    [
        (resnet, 0, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        (resnet, 1, {"layer1", "layer2", "layer3", "layer4"}),
        (resnet, 2, {"layer2", "layer3", "layer4"}),
        (litv2, 1, {"layers", "norm0", "norm1", "norm2", "norm3"}),
        (litv2, 5, {"norm0", "norm1", "norm2", "norm3"}),
        (lambda: timm.create_model("convnext_atto", features_only=True), 3, {"stages_2", "stages_3"}),
    ],
)  # fmt: skip
def test_the_first_stages_are_not_trained(make, count, left):
    with torch.device("meta"):
        body = make()
        freeze_stages(body, count)
    assert trained(body) == left


def test_stages_of_other_bodies():
    with torch.device("meta"):
        features = timm.create_model("efficientnet_b0", features_only=True)
        freeze_stages(features, 3)
        names = {
            ".".join(n.split(".")[:2]) for n, p in features.named_parameters() if p.requires_grad
        }
        assert names == {"blocks.3", "blocks.4", "blocks.5", "blocks.6"}
        lit = timm.create_model("lit_ti", features_only=True, dynamic_img_size=True)
        freeze_stages(lit, 2)
        names = {n.split(".")[1] for n, p in lit.named_parameters() if not p.requires_grad}
        assert names == {"patch_embed1", "pos_embed1", "block1"}
        vit = plain_vit("vit_tiny_patch16_224", num_classes=0)
        freeze_stages(vit, 1)
        assert trained(vit) == {"blocks", "norm"}
        with pytest.raises(ValueError, match="frozen_stages must be from 0 to 1 for this backbone"):
            freeze_stages(vit, 2)
        with pytest.raises(ValueError, match="frozen_stages: the stages of Linear are not known"):
            freeze_stages(nn.Linear(2, 2), 1)


@pytest.mark.slow
def test_stages_of_a_hugging_face_backbone():
    body = swin()
    freeze_stages(body, 2)
    frozen = {n for n, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {
        n
        for n, _ in body.named_parameters()
        if ".embeddings." in f".{n}" or "encoder.layers.0." in n
    }


@pytest.mark.parametrize("policy", ["plain", "mesa8"])
def test_frozen_parts_save_nothing_and_stay_as_they_are(policy):
    torch.manual_seed(0)
    body = resnet()
    freeze_stages(body, 2)
    model = retinanet(freeze_batch_norms(body), 5, min_size=96, max_size=128).train()
    modes = {name for name, m in model.named_modules() if not m.training}
    assert "backbone.body.model.layer1.0.conv1" in modes
    assert "backbone.body.model.layer2" not in modes
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    inputs = [scenes.images(), scenes.targets((2, 1))]
    saved = mesa_train.footprint(model, inputs, policy=policy).by_module
    stem = tuple(f"backbone.body.model.{name}" for name in ("conv1", "bn1", "layer1"))
    assert not [name for name in saved if name.startswith(stem)]
    # The folded scale of each frozen norm: at most 512 floats.
    assert max([size for name, size in saved.items() if ".bn" in name], default=0) <= 512 * 4
    before = {k: v.clone() for k, v in body.state_dict().items() if "running" in k}
    sum(model(*inputs).values()).backward()
    assert all(torch.equal(v, body.state_dict()[k]) for k, v in before.items())


def test_frozen_stages_of_litv2_drop_no_path_and_keep_their_statistics():
    torch.manual_seed(0)
    body = timm.create_model("litv2_tiny", features_only=True, drop_path_rate=0.9)
    freeze_stages(body, 3)
    model = scenes.detector("retinanet", body).eval().train()
    images = torch.randn(1, 3, 64, 64)
    before = {k: v.clone() for k, v in body.state_dict().items() if "running" in k}

    def frozen():
        return body.layers[1](body.layers[0](body.patch_embed(images)))

    assert torch.equal(frozen(), frozen())
    assert not frozen().requires_grad
    assert all(torch.equal(v, body.state_dict()[k]) for k, v in before.items())
    assert body.layers[2].training
    assert model.training
