"""ViT-22B: counts of the paper, options, position embedding, pooling, loss and initial weights."""

import pytest
import scipy.ndimage
import timm
import torch
import torch.nn.functional as F
from vit22b_helpers import on_meta, tiny

from mesa_train.models.vit22b import init as vit22b_init
from mesa_train.models.vit22b import model as vit22b
from mesa_train.models.vit22b.model import sigmoid_loss


def test_counts_are_those_of_the_paper():
    model = on_meta("vit_22b")
    matmuls = sum(
        p.numel()
        for n, p in model.blocks.named_parameters()
        if n.endswith(("in_proj.weight", "out_proj.weight"))
    )
    assert matmuls == 12 * 6144**2 * 48 == 21_743_271_936
    assert sum(p.numel() for p in model.blocks.parameters()) == 21_745_053_696
    assert sum(p.numel() for p in model.attn_pool.parameters()) == 453_052_416
    assert sum(p.numel() for p in model.parameters()) == 22_209_448_936
    assert model.num_features == 6144
    assert model.blocks[0].in_proj.weight.shape == (48 * (3 * 128 + 512), 6144)


@pytest.mark.parametrize("name", vit22b.SIZES)
def test_siblings_have_one_architecture(name):
    patch, width, depth, heads = vit22b.SIZES[name]
    model = on_meta(name, num_classes=10)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks == depth * (12 * width**2 + 4 * width + 2 * width + 2 * (width // heads))
    assert len(model.blocks) == depth
    assert model.patch_embed.patch_size == (patch, patch)
    with torch.device("meta"):
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 10)


def test_switches_and_their_mistakes():
    with pytest.raises(ValueError, match=r"qk_norm must be one of rms, layer, none, got 'RMS'"):
        on_meta("vit_22b_tiny", qk_norm="RMS")
    with pytest.raises(ValueError, match="gelu must be one of tanh, none, got 'exact'"):
        on_meta("vit_22b_tiny", gelu="exact")
    with pytest.raises(ValueError, match="num_heads=5 must divide the width 64"):
        on_meta("vit_22b_tiny", num_heads=5)
    with_bias, bare = (
        {n: p.numel() for n, p in on_meta("vit_22b", pool_bias=b).named_parameters()}
        for b in (True, False)
    )
    assert with_bias.keys() - bare.keys() == {"attn_pool.q.bias", "attn_pool.kv.bias"}
    assert sum(with_bias.values()) - sum(bare.values()) == 3 * 6144
    images = torch.randn(2, 3, 56, 56)
    assert tiny(pool_bias=False)(images).shape == (2, 10)
    names = {n for n, _ in on_meta("vit_22b_tiny", qk_norm="none").blocks[0].named_parameters()}
    assert not any("q_norm" in n for n in names)
    assert "q_norm.bias" not in dict(on_meta("vit_22b_tiny", qk_norm="layer").named_parameters())


@pytest.mark.parametrize("new", [(16, 16), (27, 27), (8, 12)])
def test_position_embedding_is_resampled_as_scipy_zooms(new):
    position = torch.randn(1, 256, 5)
    result = vit22b.resampled(position, (16, 16), new)
    grid = position[0].unflatten(0, (16, 16)).numpy()
    expected = scipy.ndimage.zoom(grid, (new[0] / 16, new[1] / 16, 1), order=1)
    # float32 coordinates.
    torch.testing.assert_close(
        result[0], torch.from_numpy(expected).flatten(0, 1), rtol=1e-4, atol=1e-5
    )


def test_other_resolutions():
    model = tiny()
    for size in ((56, 56), (84, 84), (28, 70)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 10)
    with pytest.raises(AssertionError, match="should be divisible by patch size"):
        model(torch.randn(2, 3, 60, 56))


def test_the_pooled_features_are_the_probes_input():
    model = tiny()
    images = torch.randn(2, 3, 56, 56)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (2, 64)
    torch.testing.assert_close(model.head(features), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_timms_checkpointing_and_drop_path():
    model, images = tiny(), torch.randn(2, 3, 56, 56)
    expected = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    model.set_grad_checkpointing(True)
    gradients = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    assert all(torch.equal(f, e) for f, e in zip(gradients, expected, strict=True))
    dropped = tiny(drop_path_rate=0.5)
    torch.manual_seed(3)
    a = dropped(images)
    assert not torch.equal(a, dropped(images))


def test_sigmoid_loss_is_the_sum_over_classes_and_the_mean_over_images():
    logits = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.0, -3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    probability = logits.sigmoid()
    target = F.one_hot(labels, 3)
    terms = target * probability.log() + (1 - target) * (1 - probability).log()
    expected = -terms.sum() / 2
    # The loss is taken in float32.
    assert sigmoid_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(sigmoid_loss(logits, target), sigmoid_loss(logits, labels))
    z = logits.exp().sum(-1).log().square().mean()
    with_z = sigmoid_loss(logits, labels, z_loss=0.1).item()
    assert with_z == pytest.approx((expected + 0.1 * z).item(), rel=1e-6)


def test_initial_weights_have_their_distributions():
    model = timm.create_model("vit_22b_small", num_classes=10, img_size=56)
    weight = model.blocks[3].in_proj.weight.detach().unflatten(0, (6, -1))
    square, wide = (6 / (2 * 384)) ** 0.5, (6 / (5 * 384)) ** 0.5
    assert 0.999 * square < weight[:, :192].abs().max() <= square
    assert 0.999 * wide < weight[:, 192:].abs().max() <= wide
    weight = model.blocks[3].out_proj.weight.detach().unflatten(1, (6, -1))
    assert 0.999 * square < weight[:, :, :64].abs().max() <= square
    assert 0.999 * wide < weight[:, :, 64:].abs().max() <= wide
    assert abs(weight.mean()) < 1e-3
    pool = model.attn_pool
    for kernel, bound in ((pool.kv.weight, square), (pool.mlp.fc2.weight, wide)):
        assert 0.999 * bound < kernel.detach().abs().max() <= bound
    assert model.pos_embed.std().item() == pytest.approx(384**-0.5, rel=0.05)
    assert torch.equal(model.blocks[0].q_norm.weight, torch.ones(64))
    assert 0 < model.blocks[0].in_proj.mlp_bias.abs().max() < 1e-5
    # A classifier of zeros with bias -10.
    assert torch.equal(model(torch.randn(1, 3, 56, 56)), torch.full((1, 10), -10.0))


def test_initialisation_follows_the_seed_and_refuses_meta():
    first, second = tiny(), tiny()
    vit22b_init.initialise(first, seed=1)
    vit22b_init.initialise(second, seed=1)
    same = first.state_dict()
    assert all(torch.equal(same[n], v) for n, v in second.state_dict().items())
    vit22b_init.initialise(second, seed=2)
    assert not torch.equal(first.blocks[0].in_proj.weight, second.blocks[0].in_proj.weight)
    assert not torch.equal(first.blocks[0].in_proj.weight, first.blocks[1].in_proj.weight)
    with pytest.raises(ValueError, match="pos_embed is on the meta device"):
        vit22b_init.initialise(on_meta("vit_22b_tiny"), seed=0)


def test_features_only_gives_maps_of_the_blocks():
    """Through timm's getter: the same maps as `forward_intermediates`, 4 x 4 patches of 14 pixels."""
    torch.manual_seed(0)
    maps = timm.create_model("vit_22b_tiny", img_size=56, features_only=True).eval()
    x = torch.randn(2, 3, 56, 56)
    found = maps(x)
    wanted = maps.model.forward_intermediates(x, indices=3, norm=False, intermediates_only=True)
    assert [tuple(f.shape) for f in found] == [(2, 64, 4, 4)] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert maps.feature_info.reduction() == [14, 14, 14]
