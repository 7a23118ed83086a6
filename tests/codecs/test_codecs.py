"""What every codec owes its users: decode undoes encode, also with a weight and a bias, also of normalised rows,
and the shapes that are told beforehand are those of the codes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mesa_train.codecs import bitmask, placeholder
from mesa_train.codecs.affine import Affine, group_shape
from mesa_train.codecs.lossless import Lossless
from mesa_train.codecs.running import Running

ROWS, COLS = 6, 100
CODECS = {
    **{f"{bits} bits": Affine(bits, 32) for bits in (8, 6, 5, 4, 3, 2)},
    "stochastic": Affine(8, 32, stochastic=True),
    "dither": Affine(8, 32, stochastic=True, dither=True),
    "lossless": Lossless(),
    "running": Running(None, "", 0, 32),
}
EVERY = pytest.mark.parametrize("name", CODECS)
# Half of the widest step of a grid over the range of normal numbers, and a whole one where rounding is
# stochastic; scales are rounded up to bfloat16.
STEP = {
    **{f"{bits} bits": 4.3 / (2**bits - 1) for bits in (8, 6, 5, 4, 3, 2)},
    "stochastic": 0.04,
    "dither": 0.02,
    "lossless": 0,
    "running": 0.04,
}


@pytest.fixture
def x():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_undoes_encode(name, dtype, x):
    codec = CODECS[name]
    found = codec.decode(codec.encode(x), COLS, dtype)
    assert found.dtype is dtype
    assert found.shape == x.shape
    rounding = 0 if dtype is torch.float32 else 2**-8 * x.abs().max()
    assert (found.float() - x).abs().max() <= STEP[name] + rounding


@EVERY
def test_a_weight_and_a_bias_come_after_the_value(name, x):
    codec, codes = CODECS[name], CODECS[name].encode(x)
    weight, bias = torch.rand(COLS) + 0.5, torch.randn(COLS)
    plain = codec.decode(codes, COLS, torch.float32)
    for w, b in ((weight, None), (None, bias), (weight, bias)):
        expected = plain * (1 if w is None else w) + (0 if b is None else b)
        torch.testing.assert_close(codec.decode(codes, COLS, torch.float32, w, b), expected)


@EVERY
@pytest.mark.parametrize("centred", [True, False])
def test_normalised_rows(name, centred, x):
    codec = CODECS[name]
    mean = x.mean(1) if centred else None
    rstd = 1 / x.std(1)
    normalised = (x - (mean[:, None] if centred else 0)) * rstd[:, None]
    found = codec.decode(codec.encode_normalized(x, mean, rstd), COLS, torch.float32)
    # A code may fall one step aside where the two are rounded apart.
    assert (found - normalised).abs().max() <= 1.5 * STEP[name] + 1e-5


@EVERY
def test_shapes_are_those_of_the_codes(name, x):
    codec = CODECS[name]
    codes = codec.encode_normalized(x, None, torch.ones(ROWS))
    told = codec.shapes(ROWS, COLS, torch.float32)
    assert [(tuple(t.shape), t.dtype) for t in codes] == told
    if isinstance(codec, Affine):
        assert codec.bytes(ROWS, COLS) == sum(t.nbytes for t in codes)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_parts_are_coded_as_if_alone(bits, x):
    codec = Affine(bits, 32)
    for part, found in zip(x.chunk(4, 1), codec.encode_parts(x, 4), strict=True):
        for tensor, expected in zip(found, codec.encode(part), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_passes_that_also_code(bits, x):
    """The fused forwards: PyTorch's results to rounding, and the codes of what they say."""
    codec = Affine(bits, 32)
    weight, bias = torch.rand(COLS) + 0.5, torch.randn(COLS)

    def decoded(codes):
        return codec.decode(codes, COLS, torch.float32)

    y, codes = codec.activation(x, "gelu")
    torch.testing.assert_close(y, F.gelu(x))
    assert torch.equal(decoded(codes), decoded(codec.encode(x)))
    y, codes = codec.softmax(x, torch.float32)
    torch.testing.assert_close(y, x.softmax(-1))
    assert (decoded(codes) - y).abs().max() <= STEP[f"{bits} bits"]
    for centred in (True, False):
        y, rstd, codes = codec.norm(x, weight, bias, 1e-5, centred, torch.float32)
        variance = x.var(1, correction=0) if centred else x.square().mean(1)
        torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt())
        normalised = (x - x.mean(1, keepdim=True) * centred) * rstd[:, None]
        torch.testing.assert_close(y, normalised * weight + bias)
        assert (decoded(codes) - normalised).abs().max() <= STEP[f"{bits} bits"]


def test_backwards_from_codes(x):
    """As autograd's at the decoded values."""
    codec, grad = Affine(8, 32), torch.randn(ROWS, COLS)
    codes = codec.encode(x)
    z = codec.decode(codes, COLS, torch.float32).requires_grad_()
    y = F.gelu(z)
    (expected,) = torch.autograd.grad(y, z, grad)
    torch.testing.assert_close(codec.activation_decode(codes, COLS, torch.float32, "gelu"), y)
    torch.testing.assert_close(codec.activation_backward(codes, grad, "gelu"), expected)
    for found, wanted in zip(
        codec.activation_pair(codes, grad, "gelu"), (expected, y), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    *pair, total = codec.activation_pair_sum(codes, grad, "gelu")
    torch.testing.assert_close(pair[0], expected)
    torch.testing.assert_close(pair[1], y)
    torch.testing.assert_close(total, expected.sum(0))
    s = z.detach().softmax(-1)
    codes = codec.encode(s)
    s = codec.decode(codes, COLS, torch.float32)
    expected = s * (grad - (s * grad).sum(1, keepdim=True))
    torch.testing.assert_close(codec.softmax_backward(codes, grad), expected)


def test_groups_are_balanced():
    assert group_shape(100, 32) == (4, 25)
    assert group_shape(128, 32) == (4, 32)
    assert group_shape(129, 32) == (5, 26)
    assert group_shape(5, 32) == (1, 5)
    assert group_shape(0, 32) == (0, 0)


def test_a_codec_says_what_it_is_and_what_it_refuses():
    assert str(Affine(4, 64, stochastic=True)) == "4 bits in groups of 64, stochastic"
    assert str(Affine()) == "8 bits in groups of 64, nearest"
    assert str(Lossless()) == "lossless"
    with pytest.raises(ValueError, match=r"bits must be one of .*, got 7"):
        Affine(7)
    with pytest.raises(ValueError, match=r"bits must be one of .*, got 4\.0"):
        Affine(4.0)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        Affine(8, 0)
    assert Affine(8, 1).group_size == 1


@pytest.mark.parametrize("size", [1, 8, 9, 100])
def test_a_placeholder_of_a_bitmask_has_its_shape(size):
    mask = torch.arange(size) % 3 == 0
    codes, instead = bitmask.encode(mask), placeholder.bits(mask)
    assert (instead.shape, instead.dtype) == (codes.shape, codes.dtype)


def test_a_selective_checkpoint_is_put_aside_and_put_back():
    first_pass, _ = create_selective_checkpoint_contexts([torch.ops.aten.mm.default])
    with first_pass:
        assert placeholder.selective()
        with placeholder.unseen():
            assert not placeholder.selective()
        assert placeholder.selective()
    assert not placeholder.selective()
