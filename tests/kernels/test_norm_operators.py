"""norm_backward against float64 autograd of the norm at the decoded input."""

import pytest
import torch
from float_dtypes import BITS, FLOATS

from mesa_train.kernels import reference


def case(rows, cols, dtype, bits=8, weighted=True):
    coded = reference.affine_encode(torch.randn(rows, cols), bits, 64, False, 0)
    grad = torch.randn(rows, cols).to(dtype)
    weight = torch.randn(cols).to(dtype) if weighted else None
    return grad, *coded, torch.rand(rows) + 0.5, weight


def autograd(grad, codes, scales, rstd, weight, bits, centered, dither=None):
    """The derivative of weight * xhat(x) + bias where xhat is the decoded value, in float64.

    The decoded xhat is not exactly normalised, so the norm is differentiated by its formula, with
    rstd and xhat as they are given.
    """
    xhat = reference._decode(codes, scales, bits, grad.shape[1], dither).double()
    grad, rstd = grad.double(), rstd.double()[:, None]
    d = grad if weight is None else grad * weight.double()
    dx = d - xhat * (d * xhat).mean(1, keepdim=True)
    dx = dx - d.mean(1, keepdim=True) if centered else dx
    return dx * rstd, (grad * xhat).sum(0), grad.sum(0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_formula(ops, dtype, bits, centered, weighted):
    for rows, cols in ((1, 1), (37, 130), (700, 33), (3, 2500)):
        args = case(rows, cols, dtype, bits, weighted)
        dither = 3 if bits < 8 else None
        actual = ops.norm_backward(*args, bits, centered, dtype, dither)
        expected = autograd(*args, bits, centered, dither)
        assert [t.dtype for t in actual] == [dtype, torch.float32, torch.float32]
        # Sums of float32 products; dx is then rounded to dtype. Column sums grow with the rows.
        eps = max(torch.finfo(dtype).eps, 2e-6)
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=eps, atol=2e-5 + eps)
        for a, e in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_is_the_derivative_of_torchs_norm(ops, centered):
    """With 8 bits of an input whose norm is nearly itself, torch's own autograd is close too."""
    x = torch.randn(64, 96, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True) if centered else x
    x = x / x.square().mean(1, keepdim=True).sqrt()
    weight = torch.randn(96, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(64, 96, dtype=torch.float64)
    coded = ops.affine_encode(x, 8, 96, False, 0)
    decoded = ops.affine_decode(*coded, 8, 96, torch.float64).requires_grad_()
    if centered:
        y = torch.nn.functional.layer_norm(decoded, (96,), weight, eps=0.0)
        rstd = 1 / decoded.detach().std(1, correction=0)
    else:
        y = torch.nn.functional.rms_norm(decoded, (96,), weight, eps=0.0)
        rstd = 1 / decoded.detach().square().mean(1).sqrt()
    y.backward(grad)
    dx, dweight, _ = ops.norm_backward(
        grad, *coded, rstd, weight.detach(), 8, centered, torch.float64
    )
    # The decoded input has a mean and variance within a code's error of 0 and 1: about 1e-3.
    torch.testing.assert_close(dx, decoded.grad, rtol=0, atol=2e-2)
    torch.testing.assert_close(dweight.double(), weight.grad, rtol=0, atol=5e-2)


def test_same_bits_for_any_number_of_threads(native, threads):
    args = case(3000, 130, torch.bfloat16)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(native.norm_backward(*args, 8, True, torch.bfloat16))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0)])
def test_empty(ops, rows, cols):
    dx, dweight, dbias = ops.norm_backward(*case(rows, cols, torch.float32), 8, True, torch.half)
    assert dx.shape == (rows, cols)
    assert dx.dtype == torch.half
    assert torch.equal(dweight, torch.zeros(cols))
    assert torch.equal(dbias, torch.zeros(cols))


def test_strides(ops):
    grad, *rest = case(20, 130, torch.float32)
    expected = ops.norm_backward(grad, *rest, 8, True, torch.float32)
    for strided in (torch.cat((grad, grad), 1)[:, :130], grad.t().contiguous().t()):
        actual = ops.norm_backward(strided, *rest, 8, True, torch.float32)
        torch.testing.assert_close(actual, expected)


def test_nan_is_seen(ops):
    grad, *rest = case(4, 64, torch.float32)
    grad[1, 3] = float("nan")
    dx, dweight, _ = ops.norm_backward(grad, *rest, 8, True, torch.float32)
    assert dx[1].isnan().all()
    assert dweight[3].isnan()
    assert dx[[0, 2, 3]].isfinite().all()
