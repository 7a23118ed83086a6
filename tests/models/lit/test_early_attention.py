"""Models without attention in their early stages: timm's Swin and PVT v2, and the published rows."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mesa_train
import mesa_train.models
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


@pytest.mark.parametrize(
    ("name", "parameters", "original", "giga"),
    [
        ("pvt_small_no_early_attention", 19_869_864, 24_485_864, 3.6),
        ("swin_tiny_no_early_attention", 27_953_536, 28_288_354, 4.1),
    ],
)
def test_the_published_rows_have_full_attention_in_late_stages(name, parameters, original, giga):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters < original
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    work = counter.get_total_flops() / 2
    assert round(work / 1e9, 1) == giga
    if name.startswith("swin"):
        # The model's own count has the norms and biases of convolutions, too.
        assert model.flops(corrected=True) == pytest.approx(work, rel=5e-3)
    attending = {key.partition(".attn.")[0] for key in model.state_dict() if ".attn." in key}
    stages = ("block3", "block4") if name.startswith("pvt") else ("layers.2", "layers.3")
    assert attending
    assert all(key.startswith(stages) for key in attending)


def test_swin_tiny_and_the_published_row_differ_in_attention_alone():
    with torch.device("meta"):
        models = [
            timm.create_model(name)
            for name in ("swin_tiny_patch4_window7_224", "swin_tiny_no_early_attention")
        ]
    swin, ours = (
        sum(
            p.numel()
            for key, p in model.named_parameters()
            if ".attn." not in key and ".norm1." not in key
        )
        for model in models
    )
    assert swin == ours


@pytest.mark.parametrize("name", ["pvt_small_no_early_attention", "swin_tiny_no_early_attention"])
@pytest.mark.parametrize("size", [64, 72])  # 72: an odd map before the last merging
def test_the_published_rows_train_wrapped(name, size):
    sizes = {
        "pvt": {"widths": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
        "swin": {"width": 16, "num_heads": (1, 1, 2, 2)},
    }[name[: name.index("_")]]
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=size, depths=(1, 1, 1, 1), num_classes=4, **sizes
    ).eval()
    images, labels = torch.randn(2, 3, size, size), torch.tensor([1, 2])
    out = model(images)
    mesa_train.wrap(model, "mesa8")
    wrapped_out = model(images)
    assert torch.equal(wrapped_out, out)
    F.cross_entropy(wrapped_out, labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="set img_size or dynamic_img_size=True"):
        model(torch.randn(1, 3, 96, 96))
