"""Triton: results computed from affine codes, in one pass over the codes.

The results are the values, a norm's output, an activation, its gradient, or the last two together.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas

from .activations import slope, value
from .tiles import Tiles, decode_tile, handles, launch, locate, tiles, value_mask


@triton.jit
def _decode(
    codes, scales, weight, bias, out,
    units, per_row, groups, size, cols, code_bytes, unit_bytes,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    x = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, unit_bytes,
        BITS, P, RAGGED, W,
    )  # fmt: skip
    start = place * (P * size)
    i = tl.arange(0, W)[None, :]
    if weight is not None:
        x = x * tl.load(weight + start[:, None] + i, mask, other=0).to(tl.float32)
    if bias is not None:
        x = x + tl.load(bias + start[:, None] + i, mask, other=0).to(tl.float32)
    if KIND is not None:
        x = value(x, KIND)
    at = row.to(tl.int64) * cols + start
    tl.store(out + at[:, None] + i, x.to(out.dtype.element_ty), mask)


@triton.jit
def _activation_backward(
    grad, codes, scales, dx, y,
    units, per_row, groups, size, cols, code_bytes, unit_bytes, row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    x = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, unit_bytes,
        BITS, P, RAGGED, W,
    )  # fmt: skip
    start = place * (P * size)
    i = tl.arange(0, W)[None, :]
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    g = tl.load(grad + begin[:, None] + i.to(tl.int64) * col_stride, mask, other=0).to(tl.float32)
    at = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(dx + at, (g * slope(x, KIND)).to(dx.dtype.element_ty), mask)
    if y is not None:
        tl.store(y + at, value(x, KIND).to(y.dtype.element_ty), mask)


def cut(codes: Tensor, scales: Tensor, bits: int, cols: int) -> Tiles | None:
    """The tiles of a coded matrix. RuntimeError if the number of scales does not match `cols`."""
    groups = scales.shape[1]
    size = -(-cols // max(groups, 1))
    torch._check(
        size > 0 and groups == -(-cols // size),
        lambda: f"scales must have as many groups as cols={cols} can be cut into, got {groups}",
    )
    return tiles(codes.shape[0], cols, groups, bits)


def affine_decode(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    cols: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Values (rows, cols), times weight (cols,) plus bias (cols,), in `dtype`."""
    out = schemas._affine_decode(codes, scales, bits, cols, dtype, weight, bias)
    if out.numel() == 0:
        return out
    found = cut(codes, scales, bits, cols)
    if found is None or not handles(out, weight, bias):
        return reference.affine_decode(codes, scales, bits, cols, dtype, weight, bias)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = codes.contiguous(), scales.contiguous(), weight, bias, out
    launch(_decode, found.grid, found.num_warps, tensors, found.numbers, (*found.constants, None))
    return out


def activation_decode(
    codes: Tensor, scales: Tensor, bits: int, cols: int, dtype: torch.dtype, kind: str
) -> Tensor:
    """kind(decoded), (rows, cols) in `dtype`."""
    out = schemas._activation_decode(codes, scales, bits, cols, dtype, kind)
    if out.numel() == 0:
        return out
    found = cut(codes, scales, bits, cols)
    if found is None or not handles(out):
        return reference.activation_decode(codes, scales, bits, cols, dtype, kind)
    tensors = codes.contiguous(), scales.contiguous(), None, None, out
    launch(_decode, found.grid, found.num_warps, tensors, found.numbers, (*found.constants, kind))
    return out


def activation_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Tensor:
    """grad * kind'(decoded), (rows, cols) in grad's dtype."""
    dx = schemas._activation_backward(grad, codes, scales, bits, kind)
    if dx.numel() == 0:
        return dx
    found = cut(codes, scales, bits, grad.shape[1])
    if found is None or not handles(grad):
        return reference.activation_backward(grad, codes, scales, bits, kind)
    _launch_backward(found, grad, codes, scales, dx, None, kind)
    return dx


def activation_pair(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor]:
    """(grad * kind'(decoded), kind(decoded)), both (rows, cols) in grad's dtype."""
    dx, y = schemas._activation_pair(grad, codes, scales, bits, kind)
    if dx.numel() == 0:
        return dx, y
    found = cut(codes, scales, bits, grad.shape[1])
    if found is None or not handles(grad):
        return reference.activation_pair(grad, codes, scales, bits, kind)
    _launch_backward(found, grad, codes, scales, dx, y, kind)
    return dx, y


def _launch_backward(
    found: Tiles,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    dx: Tensor,
    y: Tensor | None,
    kind: str,
) -> None:
    launch(
        _activation_backward,
        found.grid,
        found.num_warps,
        (grad, codes.contiguous(), scales.contiguous(), dx, y),
        (*found.numbers, *grad.stride()),
        (*found.constants, kind),
    )
