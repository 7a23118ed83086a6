"""Triton: softmax along the rows of a matrix, with codes.

The forward makes the codes of the output in the same pass (`schemas.py`). The backward reads these
codes.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas

from . import schemas as triton_schemas
from .encode import encode_tile, signed
from .tiles import decode_tile, handles, launch, locate_rows, row_sum, row_tiles, value_mask


@triton.jit
def _row_max(x, R: tl.constexpr, UNITS: tl.constexpr):
    """The maximum of each row of a tile (R * UNITS, W), repeated for each of the row's units."""
    most = tl.max(tl.reshape(tl.max(x, 1), (R, UNITS)), 1)
    return tl.reshape(tl.broadcast_to(most[:, None], (R, UNITS)), (R * UNITS,))


@triton.jit(do_not_specialize=["seed"])
def _forward(
    x, y, codes, scales,
    rows, per_row, groups, size, cols, code_bytes, unit_bytes, row_stride, col_stride, seed,
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
        unit_bytes, seed, BITS, P, RAGGED, R * UNITS, W, STOCHASTIC,
    )  # fmt: skip


@triton.jit
def _backward(
    grad, codes, scales, dx,
    rows, per_row, groups, size, cols, code_bytes, unit_bytes, row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr,
    UNITS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, place, live = locate_rows(rows, per_row, R, UNITS)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :]
    start = place * (P * size)
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    at = grad + begin[:, None] + i.to(tl.int64) * col_stride
    g = tl.load(at, mask, other=0).to(tl.float32)
    y = decode_tile(
        codes, scales, row, place, live, groups, size, code_bytes, unit_bytes,
        BITS, P, RAGGED, W,
    )  # fmt: skip
    along = row_sum(tl.where(mask, g * y, 0.0), R, UNITS)
    to = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(dx + to, (y * (g - along[:, None])).to(dx.dtype.element_ty), mask)


def softmax_encode(
    x: Tensor, dtype: torch.dtype, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of each row of (rows, cols), in `dtype`, and the codes and scales of the output."""
    code = bits, group_size, stochastic, seed
    y, codes, scales = triton_schemas._softmax_encode(x, dtype, *code)
    if x.numel() == 0:
        return y, codes, scales
    cut = row_tiles(*x.shape, scales.shape[1], bits)
    if cut is None or not handles(x, y):
        return triton_schemas.softmax_encode(x, dtype, *code)
    launch(
        _forward,
        cut.grid,
        cut.num_warps,
        (x, y, codes, scales),
        (*cut.numbers, *x.stride(), signed(seed) if stochastic else 0),
        (*cut.constants, stochastic),
    )
    return y, codes, scales


def softmax_backward(grad: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """y * (grad - sum(grad * y)) in grad's dtype.

    y is the decoded output of a softmax along each row.
    """
    dx = schemas._softmax_backward(grad, codes, scales, bits)
    if dx.numel() == 0:
        return dx
    cut = row_tiles(*grad.shape, scales.shape[1], bits)
    if cut is None or not handles(grad):
        return reference.softmax_backward(grad, codes, scales, bits)
    tensors = grad, codes.contiguous(), scales.contiguous(), dx
    launch(
        _backward, cut.grid, cut.num_warps, tensors, (*cut.numbers, *grad.stride()), cut.constants
    )
    return dx
