"""LITv2 against a word-by-word evaluation of its description, where no outputs of its authors are at hand."""

import golden
import literal
import pytest
import timm
import torch
from torch import nn

from mesa_train.models.lit.hilo import HiLo

HEADS = {"litv2_s": (3, 6, 12, 24), "litv2_m": (3, 6, 12, 24), "litv2_b": (4, 8, 16, 32)}


def assert_alike(result, expected, what=""):
    # Both in float64, so only the order of sums differs; a wrong eps makes 1e-6.
    torch.testing.assert_close(
        result, expected, atol=1e-9, rtol=1e-9, msg=lambda text: f"{what}: {text}"
    )


def create(name, **options):
    return golden.fill(timm.create_model(name, **options)).double().eval()


@pytest.mark.slow
@torch.no_grad()
def test_the_evaluation_itself_is_the_authors():
    with golden.arrays("litv2_s") as arrays:
        expected = torch.from_numpy(arrays["logits_f64"])
    weights = create("litv2_s").state_dict()
    images = golden.images(2, 3, 224, 224)[:1]
    assert_alike(literal.litv2(weights, images, heads=HEADS["litv2_s"]), expected[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_variant(name):
    """The classifier and the backbone for dense tasks at a size that needs padding everywhere."""
    images = golden.images(1, 3, 118, 90, seed=2)
    dense, model = create(name, features_only=True), timm.create_model(name).double().eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert unexpected == [f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")]
    assert_alike(
        model(images.double()), literal.litv2(model.state_dict(), images, heads=HEADS[name])
    )
    expected = literal.litv2(dense.state_dict(), images, heads=HEADS[name], dense=True)
    width = model.widths[0]
    assert [tuple(m.shape[1:]) for m in expected] == [
        (width, 30, 23),
        (2 * width, 15, 11),
        (4 * width, 7, 5),
        (8 * width, 3, 2),
    ]
    for stage, (values, map_) in enumerate(zip(expected, dense(images.double()), strict=True)):
        assert_alike(map_, values, f"stage {stage}")


def test_a_backbone_has_the_authors_keys_in_their_order():
    with torch.device("meta"):
        dense = timm.create_model("litv2_s", features_only=True)
    body = [k for k, _ in golden.keys("litv2_s")["keys"] if not k.startswith(("norm.", "head."))]
    norms = [f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")]
    assert list(dense.state_dict()) == body + norms


@pytest.mark.parametrize("size", [(29, 64), (61, 118), (100, 36), (118, 90), (121, 83)])
@pytest.mark.parametrize(
    ("windows", "alpha"),
    [((0, 0, 2, 1), 0.5), ((0, 0, 4, 1), 0.9), ((0, 3, 2, 2), 0.0), ((2, 5, 3, 7), 1.0)],
)
@torch.no_grad()
def test_any_size_window_and_alpha(size, windows, alpha):
    model = create("litv2_tiny", num_classes=7, windows=windows, alpha=alpha)
    images = golden.images(2, 3, *size)
    expected = literal.litv2(
        model.state_dict(), images, heads=(1, 2, 4, 8), windows=windows, alpha=alpha
    )
    assert_alike(model(images.double()), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(1, 1, 2), (3, 1, 2), (5, 7, 3), (6, 4, 4), (7, 9, 5), (3, 4, 1)],
)
def test_hilo_and_its_gradients(height, width, window, alpha, bias):
    layer = golden.fill(HiLo(48, 6, window, alpha, qkv_bias=bias)).double()
    inputs = [golden.images(2, height * width, 48).double().requires_grad_() for _ in range(2)]
    out = layer(inputs[0].view(2, height, width, 48)).flatten(1, 2)
    copies = {k: v.detach().clone().requires_grad_() for k, v in layer.state_dict().items()}
    expected = literal.hilo(inputs[1], copies, "", height, width, 6, window, alpha)
    assert_alike(out, expected)
    weights = golden.images(*out.shape, seed=1).double()
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_alike(inputs[0].grad, inputs[1].grad, "input")
    for key, parameter in layer.named_parameters():
        assert_alike(parameter.grad, copies[key].grad, key)


def test_an_independent_rate_for_both_branches_of_a_block():
    """Two draws a block, per image, survivors scaled by 1 / keep."""
    model = timm.create_model("litv2_tiny", num_classes=3, drop_path_rate=0.5).train()
    block = model.layers[3].blocks[0]
    assert block.drop_path.drop_prob == 0.5
    block.attn, block.mlp = Constant(1.0), Constant(10.0)
    torch.manual_seed(0)
    added = block(torch.zeros(400, 1, 1, 256))[:, 0, 0, 0]
    values, counts = added.unique(return_counts=True)
    assert values.tolist() == [0.0, 2.0, 20.0, 22.0]
    # A binomial of 400 and 1/4 has a deviation of 8.7.
    assert (counts - 100).abs().max() < 45


class Constant(nn.Module):
    """The same number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def test_what_training_starts_from():
    torch.manual_seed(0)
    model = timm.create_model("litv2_s")
    deform = model.layers[2].downsample.dconv
    bound = (4 * 384) ** -0.5
    assert 0.98 * bound < deform.weight.abs().max().item() <= bound
    assert deform.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert 0.9 * bound < deform.bias.abs().max().item() <= bound
    patch = model.patch_embed.proj
    bound = 48**-0.5
    assert 0.98 * bound < patch.weight.abs().max().item() <= bound
    assert patch.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert 0.8 * bound < patch.bias.abs().max().item() <= bound
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert not module.bias.any()
            assert module.eps == 1e-5
            assert getattr(module, "momentum", 0.1) == 0.1
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
            assert not module.bias.any()
