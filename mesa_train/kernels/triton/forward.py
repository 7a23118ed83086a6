"""Triton: norms and activations that make their codes in the same pass (`schemas.py`)."""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import schemas as triton_schemas
from .activations import value
from .encode import encode_tile
from .launch import Launch, contiguous, outputs, per_site, signed
from .tiles import handles, locate, locate_rows, row_sum, row_tiles, tiles, value_mask


@triton.jit(do_not_specialize=["seed"])
def _activation(
    x, y, codes, scales, seed,
    units, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    STOCHASTIC: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :].to(tl.int64)
    start = (place * (P * size)).to(tl.int64)
    begin = row.to(tl.int64) * row_stride + start * col_stride
    v = tl.load(x + begin[:, None] + i * col_stride, mask, other=0).to(tl.float32)
    at = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(y + at, value(v, KIND).to(y.dtype.element_ty), mask)
    encode_tile(
        v, mask, codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, seed,
        BITS, P, RAGGED, U, W, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def _norm(
    x, weight, bias, y, rstds, codes, scales, seed,
    rows, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride, eps,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr,
    UNITS: tl.constexpr, W: tl.constexpr, STOCHASTIC: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    row, place, live = locate_rows(rows, per_row, R, UNITS)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :]
    start = place * (P * size)
    begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
    at = x + begin[:, None] + i.to(tl.int64) * col_stride
    v = tl.load(at, mask, other=0).to(tl.float32)
    if CENTERED:
        v = tl.where(mask, v - (row_sum(v, R, UNITS) / cols)[:, None], 0.0)
    rstd = tl.rsqrt(row_sum(v * v, R, UNITS) / cols + eps)
    v = v * rstd[:, None]
    tl.store(rstds + row, rstd, live & (place == 0))
    encode_tile(
        v, mask, codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, seed,
        BITS, P, RAGGED, R * UNITS, W, STOCHASTIC,
    )  # fmt: skip
    column = start[:, None] + i
    if weight is not None:
        v = v * tl.load(weight + column, mask, other=0).to(tl.float32)
    if bias is not None:
        v = v + tl.load(bias + column, mask, other=0).to(tl.float32)
    to = (row.to(tl.int64) * cols + start)[:, None] + i
    tl.store(y + to, v.to(y.dtype.element_ty), mask)


@per_site(free=1)
def activation_encode(
    x: Tensor, kind: str, bits: int, group_size: int, stochastic: bool, seed: int
) -> Callable[..., tuple[Tensor, ...]]:
    """kind(x), (rows, cols) in x's dtype, and the codes and scales of x."""
    empty = triton_schemas._activation_encode(x, kind, bits, group_size, stochastic, seed)
    make = outputs(*empty)
    if x.numel() == 0:
        return lambda *_: tuple(make())
    rows, cols = x.shape
    cut = tiles(rows, cols, empty[-1].shape[1], bits)
    if cut is None or not handles(x):
        return triton_schemas.activation_encode
    bound = *cut.numbers, *x.stride(), *cut.constants, stochastic, kind
    launch = Launch(_activation, cut.grid, cut.num_warps, bound)

    def call(x: Tensor, *code: Any) -> tuple[Tensor, ...]:
        y, codes, scales = make()
        launch(x, y, codes, scales, signed(code[-1]))
        return y, codes, scales

    return call


@per_site(free=1)
def norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """LayerNorm (centered) or RMSNorm in `dtype`, rstd (rows,), and codes of the normalised rows.

    Arguments and results are as for `schemas.norm_encode`.
    """
    empty = triton_schemas._norm_encode(
        x, weight, bias, eps, centered, dtype, bits, group_size, stochastic, seed
    )
    make = outputs(*empty)
    if x.numel() == 0:

        def call_empty(*_: Any) -> tuple[Tensor, ...]:
            y, rstd, codes, scales = make()
            return y, rstd.fill_(eps**-0.5), codes, scales

        return call_empty
    rows, cols = x.shape
    cut = row_tiles(rows, cols, empty[-1].shape[1], bits)
    if cut is None or not handles(x, weight, bias, empty[0]):
        return triton_schemas.norm_encode
    bound = *cut.numbers, *x.stride(), eps, *cut.constants, stochastic, centered
    launch = Launch(_norm, cut.grid, cut.num_warps, bound)

    def call(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        y, rstd, codes, scales = make()
        weight, bias = contiguous(weight), contiguous(bias)
        launch(x, weight, bias, y, rstd, codes, scales, signed(rest[-1]))
        return y, rstd, codes, scales

    return call
