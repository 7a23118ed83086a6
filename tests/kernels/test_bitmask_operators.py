"""bitmask_encode, bitmask_positive and bitmask_apply: lossless, in logical order."""

import numpy as np
import pytest
import torch

from mesa_train.codecs import bitmask

SHAPES = ((), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (2, 3, 4, 5), (3, 4099))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_is_numpys_little_endian_packing(ops, shape):
    mask = torch.rand(shape) > 0.5
    expected = np.packbits(mask.numpy().reshape(-1), bitorder="little")
    assert torch.equal(ops.bitmask_encode(mask), torch.from_numpy(expected))


def test_encode_is_in_logical_order(ops):
    mask = torch.rand(6, 5, 4) > 0.5
    for view in (mask.permute(2, 0, 1), mask[:, ::2], mask[0, 0].expand(3, 4)):
        assert torch.equal(ops.bitmask_encode(view), ops.bitmask_encode(view.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_positive(ops, dtype, shape):
    x = torch.randn(shape).to(dtype)
    if x.numel() > 4:
        x.view(-1)[:5] = torch.tensor([0.0, -0.0, float("nan"), torch.finfo(dtype).tiny, -1.0])
    # A NaN counts as positive, as for the derivative of PyTorch's relu.
    assert torch.equal(ops.bitmask_positive(x), ops.bitmask_encode(~(x <= 0)))


def test_positive_sees_the_smallest_double(ops):
    x = torch.tensor([5e-324, -5e-324, 0.0, float("nan")], dtype=torch.float64)
    assert ops.bitmask_positive(x).tolist() == [0b1001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.9])
def test_apply(ops, dtype, shape, scale):
    mask = torch.rand(shape) > 0.5
    grad = torch.randn(shape).to(dtype)
    wide = grad if dtype == torch.float64 else grad.float()
    expected = torch.where(mask, wide * scale, 0.0).to(dtype)
    assert torch.equal(ops.bitmask_apply(grad, ops.bitmask_encode(mask), scale), expected)


def test_apply_keeps_dense_strides_and_reads_in_logical_order(ops):
    mask = torch.rand(4, 6, 5) > 0.5
    bits = ops.bitmask_encode(mask)
    dense = torch.randn(5, 4, 6).permute(1, 2, 0)
    for grad in (dense, torch.randn(4, 6, 10)[..., ::2], torch.randn(1, 6, 1).expand(4, 6, 5)):
        out = ops.bitmask_apply(grad, bits, 2.0)
        assert torch.equal(out, torch.where(mask, grad * 2, 0))
        assert out.stride() == torch.empty_like(grad).stride()
    assert ops.bitmask_apply(dense, bits, 1.0).stride() == dense.stride()


def test_apply_masks_nan_and_keeps_it_where_set(ops):
    grad = torch.full((2,), float("nan"))
    out = ops.bitmask_apply(grad, torch.tensor([1], dtype=torch.uint8), 1.0)
    assert out[0].isnan()
    assert out[1] == 0


def test_codec_is_relus_backward():
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 7, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(x.relu(), x, grad)
    assert torch.equal(bitmask.apply(grad, bitmask.encode_positive(x.detach())), expected)
    assert torch.equal(bitmask.encode(x > 0), bitmask.encode_positive(x.detach()))
