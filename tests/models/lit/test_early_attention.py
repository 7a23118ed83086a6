"""timm's Swin and PVT v2 without attention in their early stages."""

import pytest
import timm
import torch
import torch.nn.functional as F

import mesa_train
from mesa_train.models.lit.early_attention import without_early_attention

MODELS = {
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2), "embed_dim": 48, "img_size": 112},
    "pvt_v2_b0": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left(name):
    model = timm.create_model(name, num_classes=10, **MODELS[name])
    full = model.state_dict()
    without_early_attention(model)
    remaining = model.state_dict()
    gone = {key for key in full if key not in remaining}
    assert set(remaining) < set(full)
    stage = ("layers.{}.", "stages.{}.")["pvt" in name]
    assert all(k.startswith((stage.format(0), stage.format(1))) for k in gone)
    assert all(".attn" in k or ".norm1" in k for k in gone)
    early = [
        k for k in remaining if ".attn." in k and k.startswith((stage.format(0), stage.format(1)))
    ]
    assert not early
    assert any(".attn." in k for k in remaining)
    images, labels = torch.randn(2, 3, 112, 112), torch.tensor([1, 2])
    loss = F.cross_entropy(model.eval()(images), labels)
    mesa_train.wrap(model, "mesa8")
    wrapped_loss = F.cross_entropy(model(images), labels)
    assert torch.equal(wrapped_loss, loss)
    wrapped_loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="got ResNet"):
        without_early_attention(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="stages must be from 0 to 4, got 5"):
        without_early_attention(timm.create_model("pvt_v2_b0"), 5)
