"""activation_decode and activation_backward against torch's function and autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from float_dtypes import BITS, FLOATS

from mesa_train.kernels import reference

# Every kind from torch's functions, and quick_gelu by its definition.
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}
kinds = pytest.mark.parametrize("kind", FUNCTIONS)


def test_all_kinds_are_tested():
    assert list(FUNCTIONS) == list(reference.ACTIVATIONS)


def inputs():
    """Magnitudes from 1e-3 to 1e4, and the corners of the piecewise kinds as exact values."""
    x = torch.cat([torch.randn(20, 130) * s for s in (1e-3, 1.0, 3.0, 30.0, 1e4)])
    corners = torch.tensor([-3.0, 0.0, 3.0, -20.0, 20.0]).repeat_interleave(26)
    return torch.cat((x, corners[None]))


def coded_inputs(bits):
    # Groups of 26, so that each corner fills one: a constant group is exact.
    return reference.affine_encode(inputs(), bits, 26, False, 0)


@kinds
@pytest.mark.parametrize("bits", BITS)
def test_values(ops, kind, bits):
    coded = coded_inputs(bits)
    x = reference._decode(*coded, bits, 130).double()
    expected = FUNCTIONS[kind](x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        actual = ops.activation_decode(*coded, bits, 130, dtype, kind)
        assert actual.dtype == dtype
        # Float32 polynomials good to 1e-6, then rounding to dtype.
        eps = max(torch.finfo(dtype).eps, 2e-6)
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps)


@kinds
@pytest.mark.parametrize("dtype", FLOATS)
def test_slopes(ops, kind, dtype):
    coded = coded_inputs(8)
    x = reference._decode(*coded, 8, 130).double().requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    (expected,) = torch.autograd.grad(FUNCTIONS[kind](x), x, grad.double())
    eps = max(torch.finfo(dtype).eps, 5e-6)
    for strided in (grad, torch.cat((grad, grad), 1)[:, :130], grad.t().contiguous().t()):
        actual = ops.activation_backward(strided, *coded, 8, kind)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("bits", BITS)
def test_pair_is_both(ops, kind, bits):
    coded = coded_inputs(bits)
    grad = torch.randn(inputs().shape).bfloat16()
    dx, value = ops.activation_pair(grad, *coded, bits, kind)
    # The compiler may order a sum differently in one loop than in two.
    close = {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 1e-6}
    torch.testing.assert_close(dx, ops.activation_backward(grad, *coded, bits, kind), **close)
    expected = ops.activation_decode(*coded, bits, 130, torch.bfloat16, kind)
    torch.testing.assert_close(value, expected, **close)


@kinds
def test_huge_inputs_stay_finite(ops, kind):
    x = torch.tensor([[1e18, -1e18], [1e10, -1e10], [200.0, -200.0]]).repeat_interleave(8, 1)
    coded = reference.affine_encode(x, 8, 8, False, 0)
    assert ops.activation_decode(*coded, 8, 16, torch.float32, kind).isfinite().all()
    assert ops.activation_backward(torch.ones(3, 16), *coded, 8, kind).isfinite().all()


@kinds
def test_nan_is_seen(ops, kind):
    x = torch.full((1, 16), float("nan"))
    coded = reference.affine_encode(x, 8, 16, False, 0)
    assert ops.activation_decode(*coded, 8, 16, torch.float32, kind).isnan().all()
    grad = ops.activation_backward(torch.full((1, 16), float("nan")), *coded, 8, kind)
    # A slope of exactly 0 swallows it in some of torch's own kinds as well; never a wrong number.
    assert (grad.isnan() | (grad == 0)).all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0)])
def test_empty(ops, rows, cols):
    coded = reference.affine_encode(torch.randn(rows, cols), 4, 64, False, 0)
    assert ops.activation_decode(*coded, 4, cols, torch.half, "gelu").shape == (rows, cols)
    grad = torch.randn(rows, cols)
    assert ops.activation_backward(grad, *coded, 4, "gelu").shape == (rows, cols)
