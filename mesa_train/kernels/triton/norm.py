"""Triton: the backward of a norm from codes of its normalised input.

grad and codes are read once.
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

from .columns import add_parts, programs_at_once, split, tile
from .launch import Launch, contiguous, outputs, per_site, signed
from .tiles import WIDEST, as_scale, as_zero, dithered, group_key, handles, low_bits, unpack, warps


@triton.jit(do_not_specialize=["share", "seed"])
def _rows(
    grad, codes, scales, rstd, weight, dx, partial, seed,
    rows, cols, groups, code_bytes, low_bytes, row_stride, col_stride, share,
    size: tl.constexpr, CENTERED: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, DITHER: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = low_bits(BITS)
    # The tiles of the last program may lie beyond the last row, and their rows beyond an int32.
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)[None, :]
    b = tl.arange(0, C * LOW // 8)[None, :]
    inside = c < cols
    group = c // size
    w = tl.full((1, C), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, inside, other=0).to(tl.float32)
    pairs = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    dweight = tl.zeros((R, C), tl.float32)
    dbias = tl.zeros((R, C), tl.float32)
    for turn in range(share):
        row = (program * share + turn) * R + tl.arange(0, R)
        live = row < rows
        mask = live[:, None] & inside
        at = row[:, None] * row_stride + c.to(tl.int64) * col_stride
        g = tl.load(grad + at, mask, other=0).to(tl.float32)
        here = live[:, None] & (b < low_bytes)
        place = codes + row[:, None] * code_bytes
        q = unpack(tl.load(place + b, here, other=0), LOW)
        if BITS != LOW:
            h = tl.arange(0, C * (BITS - LOW) // 8)[None, :]
            here = live[:, None] & (h < code_bytes - low_bytes)
            q = q | (unpack(tl.load(place + low_bytes + h, here, other=0), BITS - LOW) << LOW)
        stored = tl.load(pairs + row[:, None] * groups + group, mask, other=0)
        if DITHER:
            key = group_key(stored, row[:, None] * groups + group, seed)
            value = dithered(q, stored, c - group * size, key, BITS)
        else:
            value = q.to(tl.float32)
        x_hat = value * as_scale(stored) + as_zero(stored)

        d = g * w
        along = tl.sum(d * x_hat, 1) / cols
        out = tl.fma(-along[:, None], x_hat, d)
        if CENTERED:
            out = out - (tl.sum(d, 1) / cols)[:, None]
        out = out * tl.load(rstd + row, live, other=0).to(tl.float32)[:, None]
        tl.store(dx + row[:, None] * cols + c, out.to(dx.dtype.element_ty), mask)
        dweight = tl.fma(g, x_hat, dweight)
        dbias += g
    to = partial + program * 2 * cols + tl.arange(0, C)
    columns = tl.arange(0, C) < cols
    tl.store(to, tl.sum(dweight, 0), columns)
    tl.store(to + cols, tl.sum(dbias, 0), columns)


@per_site()
def norm_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bits: int,
    centered: bool,
    dtype: torch.dtype,
    dither: int | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """dx, dweight and dbias of LayerNorm (centered) or RMSNorm from the decoded x_hat."""
    empty = schemas._norm_backward(grad, codes, scales, rstd, weight, bits, centered, dtype, dither)
    make = outputs(*empty)
    rows, cols = grad.shape
    if grad.numel() == 0:

        def call_empty(*_: Any) -> tuple[Tensor, ...]:
            dx, dweight, dbias = make()
            return dx, dweight.zero_(), dbias.zero_()

        return call_empty
    if cols > WIDEST // 2 or not handles(grad, rstd, weight, empty[0]):
        return reference.norm_backward
    height, width = tile(cols)
    num_warps = warps(2 * height * width)
    groups = scales.shape[1]
    low_bytes = packing.code_bytes(cols, packing.planes(bits)[0])
    numbers = rows, cols, groups, codes.shape[1], low_bytes, *grad.stride()
    constants = -(-cols // groups), centered, bits, height, width, dither is not None
    seed = signed(dither or 0)
    coded = codes.contiguous(), scales.contiguous()
    tensors = grad, *coded, rstd.contiguous(), contiguous(weight), empty[0], empty[1], seed
    most = programs_at_once(_rows, num_warps, (*tensors, *numbers, 1, *constants), grad.device)
    programs, share = split(triton.cdiv(rows, height), most)
    launch = Launch(_rows, (programs,), num_warps, (*numbers, share, *constants))
    add = add_parts(programs, 2, cols)
    make = outputs(*empty, grad.new_empty((programs, 2, cols), dtype=torch.float32))

    def call(
        grad: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor | None, *_: Any
    ) -> tuple[Tensor, ...]:
        dx, dweight, dbias, partial = make()
        codes, scales, rstd = codes.contiguous(), scales.contiguous(), rstd.contiguous()
        launch(grad, codes, scales, rstd, contiguous(weight), dx, partial, seed)
        add(partial, dweight, dbias)
        return dx, dweight, dbias

    return call
