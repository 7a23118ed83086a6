"""Triton: one bit per element, written and applied in one pass."""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas

from .tiles import handles, launch

# Bytes of the mask that a program writes or reads: 4096 elements at 4 warps.
_BYTES = 512


@triton.jit
def _encode(x, bits, numel, BYTES: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BYTES
    i = begin * 8 + tl.arange(0, BYTES * 8)
    value = tl.load(x + i, i < numel, other=0)
    if value.dtype == tl.bfloat16:
        value = value.to(tl.float32)
    flags = tl.reshape(1 - (value <= 0).to(tl.int32), (BYTES, 8))
    packed = tl.sum(flags << tl.arange(0, 8)[None, :], 1)
    b = begin + tl.arange(0, BYTES)
    tl.store(bits + b, packed.to(tl.uint8), b * 8 < numel)


@triton.jit
def _apply(grad, bits, out, numel, scale, BYTES: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BYTES
    b = begin + tl.arange(0, BYTES)
    packed = tl.load(bits + b, b * 8 < numel, other=0).to(tl.int32)
    flags = tl.reshape((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BYTES * 8,))
    i = begin * 8 + tl.arange(0, BYTES * 8)
    g = tl.load(grad + i, i < numel, other=0).to(tl.float32)
    kept = tl.where(flags != 0, g * scale, 0.0)
    tl.store(out + i, kept.to(out.dtype.element_ty), i < numel)


def _write_bits(x: Tensor, bits: Tensor) -> Tensor:
    if x.numel():
        grid = (triton.cdiv(bits.numel(), _BYTES),)
        launch(_encode, grid, 4, (x.contiguous(), bits), (x.numel(),), (_BYTES,))
    return bits


def bitmask_encode(mask: Tensor) -> Tensor:
    """Bool of any shape to uint8 (ceil(numel / 8),), row-major, low bit first."""
    bits = schemas._bitmask_encode(mask)
    return _write_bits(mask.contiguous().view(torch.uint8), bits)


def bitmask_positive(x: Tensor) -> Tensor:
    """Bits of x > 0. A NaN counts as positive."""
    bits = schemas._bitmask_positive(x)
    return _write_bits(x, bits) if handles(x) else reference.bitmask_positive(x)


def bitmask_apply(grad: Tensor, bits: Tensor, scale: float) -> Tensor:
    """grad * scale if the bit is set, else 0. Strides follow grad."""
    out = schemas._bitmask_apply(grad, bits, scale)
    numel = grad.numel()
    if numel == 0:
        return out
    # A kernel gets its numbers in float32, which is too coarse for the scale of float64 values.
    if grad.dtype == torch.float64 or not handles(grad):
        return reference.bitmask_apply(grad, bits, scale)
    dense = (
        out
        if out.is_contiguous()
        else torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    )
    grid = (triton.cdiv(bits.numel(), _BYTES),)
    tensors = grad.contiguous(), bits.contiguous(), dense
    launch(_apply, grid, 4, tensors, (numel, scale), (_BYTES,))
    return out if dense is out else out.copy_(dense)
