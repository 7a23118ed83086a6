"""Triton: a norm's backward from codes of its normalised input, in two launches.

The first reads grad and codes once: a program walks its share of the rows, writes their dx and adds
up its own column sums. The second adds those in order. There are no atomics, so the same input
gives the same bits again on the same device.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas
from mesa_train.kernels.triton_tiles import (
    WIDEST,
    as_scale,
    as_zero,
    handles,
    launch,
    unpack,
    warps,
)

# Elements of a tile and programs a multiprocessor: together they keep enough loads in flight, and
# the partial column sums stay a few percent of the traffic.
_TILE = 2048
_PROGRAMS = 4
# Columns and partial sums that a program of the second launch reads at once.
_COLUMNS, _PARTS = 32, 64


@triton.jit
def _rows(
    grad, codes, scales, rstd, weight, dx, partial,
    rows, cols, groups, code_bytes, row_stride, col_stride, share,
    size: tl.constexpr, CENTERED: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 // BITS
    program = tl.program_id(0)
    c = tl.arange(0, C)[None, :]
    b = tl.arange(0, C // PER)[None, :]
    inside = c < cols
    group = c // size
    w = tl.full((1, C), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, inside, other=0).to(tl.float32)
    pairs = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    dweight = tl.zeros((R, C), tl.float32)
    dbias = tl.zeros((R, C), tl.float32)
    for turn in range(share):
        row = ((program * share + turn) * R + tl.arange(0, R)).to(tl.int64)
        live = row < rows
        mask = live[:, None] & inside
        at = row[:, None] * row_stride + c.to(tl.int64) * col_stride
        g = tl.load(grad + at, mask, other=0).to(tl.float32)
        here = live[:, None] & (b < code_bytes)
        q = unpack(tl.load(codes + row[:, None] * code_bytes + b, here, other=0), BITS)
        stored = tl.load(pairs + row[:, None] * groups + group, mask, other=0)
        x_hat = q.to(tl.float32) * as_scale(stored) + as_zero(stored)

        d = g * w
        along = tl.sum(d * x_hat, 1) / cols
        out = tl.fma(-along[:, None], x_hat, d)
        if CENTERED:
            out = out - (tl.sum(d, 1) / cols)[:, None]
        out = out * tl.load(rstd + row, live, other=0).to(tl.float32)[:, None]
        tl.store(dx + row[:, None] * cols + c, out.to(dx.dtype.element_ty), mask)
        dweight = tl.fma(g, x_hat, dweight)
        dbias += g
    to = partial + program.to(tl.int64) * 2 * cols + tl.arange(0, C)
    columns = tl.arange(0, C) < cols
    tl.store(to, tl.sum(dweight, 0), columns)
    tl.store(to + cols, tl.sum(dbias, 0), columns)


@triton.jit
def _columns(
    partial, dweight, dbias, parts, cols, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (c < cols)[None, :]
        at = (part * 2 + which).to(tl.int64)[:, None] * cols + c[None, :]
        total += tl.load(partial + at, mask, other=0)
    out = tl.sum(total, 0)
    if which == 0:
        tl.store(dweight + c, out, c < cols)
    else:
        tl.store(dbias + c, out, c < cols)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


@lru_cache(maxsize=4096)
def _split(rows: int, cols: int, device: torch.device) -> tuple[int, int, int, int]:
    """(rows of a tile, columns of a tile, programs, tiles that a program walks)."""
    width = max(triton.next_power_of_2(cols), 16)
    height = max(1, min(_TILE // width, 16))
    count = triton.cdiv(rows, height)
    share = triton.cdiv(count, _PROGRAMS * _multiprocessors(device))
    return height, width, triton.cdiv(count, share), share


def norm_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bits: int,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm (centered) or RMSNorm at the decoded normalised input: dx, dweight, dbias."""
    dx, dweight, dbias = schemas._norm_backward(
        grad, codes, scales, rstd, weight, bits, centered, dtype
    )
    rows, cols = grad.shape
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    if cols > WIDEST // 2 or not handles(grad, rstd, weight, dx):
        return reference.norm_backward(grad, codes, scales, rstd, weight, bits, centered, dtype)
    height, width, programs, share = _split(rows, cols, grad.device)
    groups = scales.shape[1]
    partial = grad.new_empty((programs, 2, cols), dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    launch(
        _rows,
        (programs,),
        warps(2 * height * width),
        (grad, codes.contiguous(), scales.contiguous(), rstd.contiguous(), weight, dx, partial),
        (rows, cols, groups, codes.shape[1], *grad.stride(), share),
        (-(-cols // groups), centered, bits, height, width),
    )
    launch(
        _columns,
        (triton.cdiv(cols, _COLUMNS), 2),
        4,
        (partial, dweight, dbias),
        (programs, cols),
        (_COLUMNS, _PARTS),
    )
    return dx, dweight, dbias
