"""Forwards that make their codes on the way: close to PyTorch's own, codes of what they computed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter

from mesa_train.kernels import packing, reference, schemas
from mesa_train.kernels.triton import schemas as triton_schemas

SHAPES = ((1, 1, 1), (9, 1, 64), (12, 33, 7), (5, 197, 128), (9, 384, 128), (7, 768, 128))
OPERATORS = ("norm_encode", "activation_encode", "softmax_encode")


@pytest.fixture(params=["reference", "native", "triton"])
def forward(request):
    if request.param == "reference":
        return triton_schemas
    request.getfixturevalue(request.param)
    if request.param == "triton":
        return triton_interpreter.apart()
    return SimpleNamespace(**{n: getattr(torch.ops.mesa_train, n).default for n in OPERATORS})


def same_codes(codes, expected, bits, cols):
    """Equal, but for values that fell on the other side of a step: float32 sums in another order."""
    (a, a_scales), (e, e_scales) = codes, expected
    torch.testing.assert_close(a_scales.float(), e_scales.float(), rtol=2**-7, atol=1e-6)
    steps = packing.unpack(a, bits, cols) - packing.unpack(e, bits, cols)
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 0.02


@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", schemas.BITS)
@pytest.mark.parametrize("centered", [True, False])
def test_norms(forward, rows, cols, group_size, bits, centered):
    x = torch.randn(rows, 2 * cols)[:, cols:] * 3 + 1
    weight, bias = torch.randn(cols), torch.randn(cols).to(torch.bfloat16)
    bias = bias if centered else None
    y, rstd, *coded = forward.norm_encode(
        x, weight, bias, 1e-5, centered, torch.float32, bits, group_size, False, 0
    )
    if centered:
        expected = F.layer_norm(x, (cols,), weight, bias.float(), 1e-5)
        _, mean, expected_rstd = torch.native_layer_norm(x, (cols,), None, None, 1e-5)
        mean = mean.view(-1)
    else:
        expected = F.rms_norm(x, (cols,), weight, 1e-5)
        mean, expected_rstd = None, (x.square().mean(1) + 1e-5).rsqrt()
    # Sums of up to 768 float32s in another order; with one column x - mean is rounding times 300.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5 if cols > 1 else 1e-3)
    torch.testing.assert_close(rstd, expected_rstd.view(-1), rtol=1e-5, atol=0)
    if cols > 1:
        normalized = reference.normalized_encode(x, mean, rstd, bits, group_size, False, 0)
        same_codes(coded, normalized, bits, cols)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_other_dtypes(forward, dtype):
    x = torch.randn(6, 192).to(dtype)
    y, *_ = forward.norm_encode(x, None, None, 1e-6, True, dtype, 8, 64, True, 3)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.layer_norm(x.float(), (192,), eps=1e-6).to(dtype))


@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_activations(forward, rows, cols, group_size, stochastic, kind):
    for bits in schemas.BITS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 2 * cols).to(dtype)[:, ::2] * 3
            y, *coded = forward.activation_encode(x, kind, bits, group_size, stochastic, 5)
            expected = getattr(F, kind)(x.float()).to(dtype)
            eps = max(torch.finfo(dtype).eps, 2e-6)
            torch.testing.assert_close(y, expected, rtol=eps, atol=eps)
            codes = reference.affine_encode(x, bits, group_size, stochastic, 5)
            assert all(torch.equal(a, e) for a, e in zip(coded, codes, strict=True))


@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_softmax(forward, rows, cols, group_size, stochastic):
    for bits in schemas.BITS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 2 * cols).to(dtype)[:, cols:] * 4
            x[0, 0] = float("-inf") if cols > 1 else 0.0  # a masked key
            y, *coded = forward.softmax_encode(x, dtype, bits, group_size, stochastic, 5)
            expected = x.float().softmax(1).to(dtype)
            eps = max(torch.finfo(dtype).eps, 2e-6)
            torch.testing.assert_close(y, expected, rtol=eps, atol=eps)
            codes = reference.affine_encode(y, bits, group_size, stochastic, 5)
            assert all(torch.equal(a, e) for a, e in zip(coded, codes, strict=True))


def test_a_softmax_over_nothing_is_nan(forward):
    x = torch.randn(3, 64)
    x[1] = float("-inf")
    y, *coded = forward.softmax_encode(x, torch.float32, 8, 32, False, 0)
    assert y[1].isnan().all()
    assert reference.affine_decode(*coded, 8, 64, torch.float32)[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], x[[0, 2]].softmax(1))


def test_a_row_with_nan_is_nan(forward):
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y, rstd, *coded = forward.norm_encode(x, None, None, 1e-5, True, torch.float32, 8, 32, False, 0)
    assert y[1].isnan().all()
    assert rstd[1].isnan()
    assert reference.affine_decode(*coded, 8, 64, torch.float32)[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    x = torch.randn(6, 130)
    args = {
        "norm_encode": (x, x[0], None, 1e-5, True, torch.bfloat16, 4, 64, False, 0),
        "activation_encode": (x, "gelu", 4, 64, True, 1),
        "softmax_encode": (x, torch.bfloat16, 4, 64, True, 1),
    }[name]
    torch.library.opcheck(getattr(torch.ops.mesa_train, name).default, args)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(forward, shape):
    x = torch.randn(shape)
    assert forward.activation_encode(x, "gelu", 4, 64, False, 0)[0].shape == shape
    assert forward.softmax_encode(x, torch.half, 4, 64, False, 0)[0].shape == shape
    if shape[1]:
        y, rstd, *_ = forward.norm_encode(x, None, None, 1e-5, True, torch.half, 4, 64, False, 0)
        assert (y.shape, y.dtype, rstd.shape) == (shape, torch.half, (0,))
