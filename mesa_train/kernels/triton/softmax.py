"""Triton: softmax along the rows of a matrix, with codes.

The forward makes the codes of the output in the same pass (`schemas.py`). The backward reads these
codes.
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

from mesa_train.kernels import reference, schemas

from . import schemas as triton_schemas
from .encode import encode_tile
from .launch import Launch, outputs, per_site, signed
from .tiles import decode_tile, handles, locate_rows, row_sum, row_tiles, value_mask


@triton.jit
def _row_max(x, R: tl.constexpr, UNITS: tl.constexpr):
    """The maximum of each row of a tile (R * UNITS, W), repeated for each of the row's units."""
    most = tl.max(tl.reshape(tl.max(x, 1), (R, UNITS)), 1)
    return tl.reshape(tl.broadcast_to(most[:, None], (R, UNITS)), (R * UNITS,))


@triton.jit(do_not_specialize=["seed"])
def _forward(
    x, y, codes, scales, seed,
    rows, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr,
    UNITS: tl.constexpr, W: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    row, place, live = locate_rows(rows, per_row, R, UNITS)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :]
    start = place * (P * size)
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    at = x + begin[:, None] + i.to(tl.int64) * col_stride
    v = tl.load(at, mask, other=-float("inf")).to(tl.float32)
    # A row that is -inf everywhere gives NaN, as in PyTorch. Elements outside the matrix are not
    # computed.
    v = tl.where(mask, tl.exp(v - _row_max(v, R, UNITS)[:, None]), 0.0)
    v = v / row_sum(v, R, UNITS)[:, None]
    rounded = v.to(y.dtype.element_ty)
    to = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(y + to, rounded, mask)
    encode_tile(
        rounded.to(tl.float32), mask, codes, scales, row, place, live, groups, size, code_bytes,
        low_bytes, low_unit, high_unit, seed, BITS, P, RAGGED, R * UNITS, W, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def _backward(
    grad, codes, scales, dx, seed,
    rows, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr,
    UNITS: tl.constexpr, W: tl.constexpr, DITHER: tl.constexpr,
):  # fmt: skip
    row, place, live = locate_rows(rows, per_row, R, UNITS)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :]
    start = place * (P * size)
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    at = grad + begin[:, None] + i.to(tl.int64) * col_stride
    g = tl.load(at, mask, other=0).to(tl.float32)
    y = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, seed, BITS, P, RAGGED, W, DITHER,
    )  # fmt: skip
    along = row_sum(tl.where(mask, g * y, 0.0), R, UNITS)
    to = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(dx + to, (y * (g - along[:, None])).to(dx.dtype.element_ty), mask)


@per_site(free=1)
def softmax_encode(
    x: Tensor, dtype: torch.dtype, bits: int, group_size: int, stochastic: bool, seed: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Softmax of each row of (rows, cols), in `dtype`, and the codes and scales of the output."""
    empty = triton_schemas._softmax_encode(x, dtype, bits, group_size, stochastic, seed)
    make = outputs(*empty)
    if x.numel() == 0:
        return lambda *_: tuple(make())
    rows, cols = x.shape
    cut = row_tiles(rows, cols, empty[-1].shape[1], bits)
    if cut is None or not handles(x, empty[0]):
        return triton_schemas.softmax_encode
    bound = *cut.numbers, *x.stride(), *cut.constants, stochastic
    launch = Launch(_forward, cut.grid, cut.num_warps, bound)

    def call(x: Tensor, *code: Any) -> tuple[Tensor, ...]:
        y, codes, scales = make()
        launch(x, y, codes, scales, signed(code[-1]))
        return y, codes, scales

    return call


@per_site()
def softmax_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, dither: int | None = None
) -> Callable[..., Tensor]:
    """y * (grad - sum(grad * y)) in grad's dtype.

    y is the decoded output of a softmax along each row.
    """
    make = outputs(schemas._softmax_backward(grad, codes, scales, bits, dither))
    if grad.numel() == 0:
        return lambda *_: make()[0]
    rows, cols = grad.shape
    cut = row_tiles(rows, cols, scales.shape[1], bits)
    if cut is None or not handles(grad):
        return reference.softmax_backward
    bound = *cut.numbers, *grad.stride(), *cut.constants, dither is not None
    seed = signed(dither or 0)
    launch = Launch(_backward, cut.grid, cut.num_warps, bound)

    def call(grad: Tensor, codes: Tensor, scales: Tensor, *_: Any) -> Tensor:
        (dx,) = make()
        launch(grad, codes.contiguous(), scales.contiguous(), dx, seed)
        return dx

    return call
