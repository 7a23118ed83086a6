"""scale_backward against float64 arithmetic."""

import pytest
import torch
from float_dtypes import FLOATS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
def test_formula(ops, dtype, to):
    for rows, cols in ((1, 1), (37, 130), (700, 33), (3, 2500)):
        grad, scale = torch.randn(rows, cols).to(dtype), torch.randn(cols)
        scaled, cast, total = ops.scale_backward(grad, scale, to)
        assert [t.dtype for t in (scaled, cast, total)] == [to, to, torch.float32]
        exact = grad.float().double()
        eps = max(torch.finfo(to).eps, 2e-6)
        torch.testing.assert_close(scaled.double(), exact * scale.double(), rtol=eps, atol=eps)
        assert torch.equal(cast, grad.float().to(to))
        # A sum of up to 700 float32 numbers.
        torch.testing.assert_close(total.double(), exact.sum(0), rtol=1e-5, atol=1e-4)


def test_strides(ops):
    grad, scale = torch.randn(20, 130), torch.randn(130)
    expected = ops.scale_backward(grad, scale, torch.bfloat16)
    for strided in (torch.cat((grad, grad), 1)[:, :130], grad.t().contiguous().t()):
        actual = ops.scale_backward(strided, scale, torch.bfloat16)
        torch.testing.assert_close(actual, expected)
        assert all(t.is_contiguous() for t in actual)


def test_nan_and_inf_are_seen(ops):
    grad, scale = torch.randn(4, 64), torch.ones(64)
    grad[1, 3], grad[2, 5] = float("nan"), float("inf")
    for t in ops.scale_backward(grad, scale, torch.half):
        assert t[..., 3].isnan().any()
        assert t[..., 5].isinf().any()
        assert t[..., 7:].isfinite().all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0)])
def test_empty(ops, rows, cols):
    scaled, cast, total = ops.scale_backward(torch.randn(rows, cols), torch.randn(cols), torch.half)
    assert scaled.shape == cast.shape == (rows, cols)
    assert torch.equal(total, torch.zeros(cols))
