"""Triton: three results from one read of the gradient behind a layer scale.

The results are the scaled gradient, its cast, and its column sums.
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

from .columns import add_parts, programs_at_once, split, tile
from .launch import Launch, outputs, per_site
from .tiles import WIDEST, handles, warps


@triton.jit(do_not_specialize=["share"])
def _rows(
    grad, scale, scaled, cast, partial,
    rows, cols, row_stride, col_stride, share,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # The tiles of the last program may lie beyond the last row, and their rows beyond an int32.
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)[None, :]
    inside = c < cols
    s = tl.load(scale + c, inside, other=0).to(tl.float32)
    total = tl.zeros((R, C), tl.float32)
    for turn in range(share):
        row = (program * share + turn) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & inside
        at = row[:, None] * row_stride + c.to(tl.int64) * col_stride
        g = tl.load(grad + at, mask, other=0).to(tl.float32)
        to = row[:, None] * cols + c
        tl.store(scaled + to, (g * s).to(scaled.dtype.element_ty), mask)
        tl.store(cast + to, g.to(cast.dtype.element_ty), mask)
        total += g
    columns = tl.arange(0, C) < cols
    tl.store(partial + program * cols + tl.arange(0, C), tl.sum(total, 0), columns)


@per_site()
def scale_backward(
    grad: Tensor, scale: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, ...]]:
    """grad * scale and grad, both in `dtype`, and grad's column sums in float32."""
    empty = schemas._scale_backward(grad, scale, dtype)
    make = outputs(*empty)
    rows, cols = grad.shape
    if grad.numel() == 0:

        def call_empty(*_: Any) -> tuple[Tensor, ...]:
            scaled, cast, total = make()
            return scaled, cast, total.zero_()

        return call_empty
    if cols > WIDEST // 2 or not handles(grad, scale, empty[0]):
        return reference.scale_backward
    height, width = tile(cols)
    num_warps = warps(2 * height * width)
    numbers = rows, cols, *grad.stride()
    arguments = grad, scale.contiguous(), *empty, *numbers, 1, height, width
    most = programs_at_once(_rows, num_warps, arguments, grad.device)
    programs, share = split(triton.cdiv(rows, height), most)
    launch = Launch(_rows, (programs,), num_warps, (*numbers, share, height, width))
    add = add_parts(programs, 1, cols)
    make = outputs(*empty, grad.new_empty((programs, 1, cols), dtype=torch.float32))

    def call(grad: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
        scaled, cast, total, partial = make()
        launch(grad, scale.contiguous(), scaled, cast, partial)
        add(partial, total, None)
        return scaled, cast, total

    return call
