"""Triton: results computed from affine codes, in one pass over the codes.

The results are the values, a norm's output, an activation, its gradient, or the last two together.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import packing, reference, schemas

from .activations import slope, value
from .launch import Launch, contiguous, outputs, per_site, signed
from .tiles import TILE, Tiles, decode_tile, handles, locate, tiles, value_mask


@triton.jit(do_not_specialize=["seed"])
def _decode(
    codes, scales, weight, bias, out, seed,
    units, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    KIND: tl.constexpr, DITHER: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    x = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, seed, BITS, P, RAGGED, W, DITHER,
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
    units, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    x = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, 0, BITS, P, RAGGED, W, False,
    )  # fmt: skip
    start = place * (P * size)
    i = tl.arange(0, W)[None, :]
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    g = tl.load(grad + begin[:, None] + i.to(tl.int64) * col_stride, mask, other=0).to(tl.float32)
    at = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(dx + at, (g * slope(x, KIND)).to(dx.dtype.element_ty), mask)
    if y is not None:
        tl.store(y + at, value(x, KIND).to(y.dtype.element_ty), mask)


def cut(codes: Tensor, scales: Tensor, bits: int, cols: int, elements: int = TILE) -> Tiles | None:
    """The tiles of a coded matrix. RuntimeError if the number of scales does not match `cols`.

    `elements`: of a tile.
    """
    groups = scales.shape[1]
    size = -(-cols // max(groups, 1))
    torch._check(
        size > 0 and groups == -(-cols // size),
        lambda: f"scales must have as many groups as cols={cols} can be cut into, got {groups}",
    )
    return tiles(codes.shape[0], cols, groups, bits, elements)


def few_elements(bits: int) -> int:
    """The elements of a tile for a kernel that needs many registers.

    The two planes of a code have two layouts in registers, so a tile of such codes is smaller.
    """
    return TILE // len(packing.planes(bits))


@per_site()
def affine_decode(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    cols: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dither: int | None = None,
) -> Callable[..., Tensor]:
    """Values (rows, cols), times weight (cols,) plus bias (cols,), in `dtype`."""
    empty = schemas._affine_decode(codes, scales, bits, cols, dtype, weight, bias, dither)
    make = outputs(empty)
    if empty.numel() == 0:
        return lambda *_: make()[0]
    found = cut(codes, scales, bits, cols)
    if found is None or not handles(empty, weight, bias):
        return reference.affine_decode
    bound = *found.numbers, *found.constants, None, dither is not None
    seed = signed(dither or 0)
    launch = Launch(_decode, found.grid, found.num_warps, bound)

    def call(
        codes: Tensor,
        scales: Tensor,
        _bits: int,
        _cols: int,
        _dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        _dither: int | None = None,
    ) -> Tensor:
        (out,) = make()
        weight, bias = contiguous(weight), contiguous(bias)
        launch(codes.contiguous(), scales.contiguous(), weight, bias, out, seed)
        return out

    return call


@per_site()
def activation_decode(
    codes: Tensor, scales: Tensor, bits: int, cols: int, dtype: torch.dtype, kind: str
) -> Callable[..., Tensor]:
    """kind(decoded), (rows, cols) in `dtype`."""
    empty = schemas._activation_decode(codes, scales, bits, cols, dtype, kind)
    make = outputs(empty)
    if empty.numel() == 0:
        return lambda *_: make()[0]
    found = cut(codes, scales, bits, cols)
    if found is None or not handles(empty):
        return reference.activation_decode
    bound = *found.numbers, *found.constants, kind, False
    launch = Launch(_decode, found.grid, found.num_warps, bound)

    def call(codes: Tensor, scales: Tensor, *_: Any) -> Tensor:
        (out,) = make()
        launch(codes.contiguous(), scales.contiguous(), None, None, out, 0)
        return out

    return call


@per_site()
def activation_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Callable[..., Tensor]:
    """grad * kind'(decoded), (rows, cols) in grad's dtype."""
    make = outputs(schemas._activation_backward(grad, codes, scales, bits, kind))
    if grad.numel() == 0:
        return lambda *_: make()[0]
    launch = _launch_backward(grad, codes, scales, bits, kind)
    if launch is None:
        return reference.activation_backward

    def call(grad: Tensor, codes: Tensor, scales: Tensor, *_: Any) -> Tensor:
        (dx,) = make()
        launch(grad, codes.contiguous(), scales.contiguous(), dx, None)
        return dx

    return call


@per_site()
def activation_pair(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    """(grad * kind'(decoded), kind(decoded)), both (rows, cols) in grad's dtype."""
    make = outputs(*schemas._activation_pair(grad, codes, scales, bits, kind))
    if grad.numel() == 0:
        return lambda *_: tuple(make())
    launch = _launch_backward(grad, codes, scales, bits, kind)
    if launch is None:
        return reference.activation_pair

    def call(grad: Tensor, codes: Tensor, scales: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        dx, y = make()
        launch(grad, codes.contiguous(), scales.contiguous(), dx, y)
        return dx, y

    return call


def _launch_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Launch | None:
    """The launch of the kernel, or None if it cannot read these tensors."""
    found = cut(codes, scales, bits, grad.shape[1], few_elements(bits))
    if found is None or not handles(grad):
        return None
    bound = *found.numbers, *grad.stride(), *found.constants, kind
    return Launch(_activation_backward, found.grid, found.num_warps, bound)
