"""Triton: one bit per element, written and applied in one pass."""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas

from .launch import Launch, outputs, per_site
from .tiles import handles

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
def _apply(grad, bits, out, scale, numel, BYTES: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BYTES
    b = begin + tl.arange(0, BYTES)
    packed = tl.load(bits + b, b * 8 < numel, other=0).to(tl.int32)
    flags = tl.reshape((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BYTES * 8,))
    i = begin * 8 + tl.arange(0, BYTES * 8)
    g = tl.load(grad + i, i < numel, other=0).to(tl.float32)
    kept = tl.where(flags != 0, g * scale, 0.0)
    tl.store(out + i, kept.to(out.dtype.element_ty), i < numel)


def _write_bits(empty: Tensor, numel: int) -> Callable[[Tensor], Tensor]:
    """A function from a tensor to its bits. `empty`: the bits, not yet written."""
    make = outputs(empty)
    if numel == 0:
        return lambda _: make()[0]
    launch = Launch(_encode, (triton.cdiv(empty.numel(), _BYTES),), 4, (numel, _BYTES))

    def call(x: Tensor) -> Tensor:
        (bits,) = make()
        launch(x.contiguous(), bits)
        return bits

    return call


@per_site()
def bitmask_encode(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Bool of any shape to uint8 (ceil(numel / 8),), row-major, low bit first."""
    write = _write_bits(schemas._bitmask_encode(mask), mask.numel())
    return lambda mask: write(mask.contiguous().view(torch.uint8))


@per_site()
def bitmask_positive(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Bits of x > 0. A NaN counts as positive."""
    empty = schemas._bitmask_positive(x)
    return _write_bits(empty, x.numel()) if handles(x) else reference.bitmask_positive


@per_site(free=1)
def bitmask_apply(
    grad: Tensor, bits: Tensor, scale: float
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """grad * scale if the bit is set, else 0. Strides follow grad."""
    empty = schemas._bitmask_apply(grad, bits, scale)
    make = outputs(empty)
    if grad.numel() == 0:
        return lambda *_: make()[0]
    # A kernel gets its numbers in float32, which is too coarse for the scale of float64 values.
    if grad.dtype == torch.float64 or not handles(grad):
        return reference.bitmask_apply
    grid = (triton.cdiv(bits.numel(), _BYTES),)
    launch = Launch(_apply, grid, 4, (grad.numel(), _BYTES))
    dense = outputs(empty.contiguous())
    in_order = empty.is_contiguous()

    def call(grad: Tensor, bits: Tensor, scale: float) -> Tensor:
        (out,) = dense()
        launch(grad.contiguous(), bits.contiguous(), out, scale)
        return out if in_order else make()[0].copy_(out)

    return call
