"""softmax_backward against float64 autograd of softmax's derivative at the decoded output."""

import pytest
import torch
from float_dtypes import BITS, FLOATS

from mesa_train.kernels import reference


def case(rows, cols, dtype, bits=8):
    y = (torch.randn(rows, cols) * 3).softmax(1)
    grad = torch.randn(rows, cols).to(dtype)
    return grad, *reference.affine_encode(y, bits, 64, False, 0), bits


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_formula(ops, dtype, bits):
    for rows, cols in ((1, 1), (37, 130), (70, 33), (3, 2500)):
        grad, codes, scales, bits = case(rows, cols, dtype, bits)
        dither = 3 if bits < 8 else None
        actual = ops.softmax_backward(grad, codes, scales, bits, dither)
        y = reference._decode(codes, scales, bits, cols, dither).double()
        expected = torch.ops.aten._softmax_backward_data(grad.double(), y, 1, torch.float64)
        assert actual.dtype == dtype
        # Sums of up to 2500 float32 products, rounded to dtype.
        eps = max(torch.finfo(dtype).eps, 2e-6)
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps)


def test_strides(ops):
    grad, *rest = case(20, 130, torch.float32)
    expected = ops.softmax_backward(grad, *rest)
    for strided in (torch.cat((grad, grad), 1)[:, :130], grad.t().contiguous().t()):
        torch.testing.assert_close(ops.softmax_backward(strided, *rest), expected)


def test_nan_is_seen(ops):
    grad, *rest = case(4, 64, torch.float32)
    grad[1, 3] = float("nan")
    dx = ops.softmax_backward(grad, *rest)
    assert dx[1].isnan().all()
    assert dx[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0)])
def test_empty(ops, rows, cols):
    grad = torch.randn(rows, cols)
    coded = reference.affine_encode(grad, 8, 64, False, 0)
    assert ops.softmax_backward(grad, *coded, 8).shape == (rows, cols)
