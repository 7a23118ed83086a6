"""Triton: an activation and its gradient from codes, and the sum of this gradient over the rows.

The sum is the gradient of the bias in front of the activation. A separate sum would read the
gradient again.
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

from . import schemas as triton_schemas
from .activations import slope, value
from .columns import add_parts, programs_at_once, split
from .decode import cut, few_elements
from .launch import Launch, outputs, per_site
from .tiles import decode_tile, handles, value_mask

# Programs per multiprocessor, at most. They keep as many loads in flight as one program per tile
# would.
_PROGRAMS = 8


@triton.jit(do_not_specialize=["share"])
def _pair(
    grad, codes, scales, dx, y, partial,
    rows, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride, share,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    # A program processes rows of one unit, so that its sums stay in registers.
    place = tl.zeros((R,), tl.int32) + tl.program_id(0)
    program = tl.program_id(1)
    start = place * (P * size)
    i = tl.arange(0, W)[None, :]
    total = tl.zeros((R, W), tl.float32)
    for turn in range(share):
        row = (program * share + turn) * R + tl.arange(0, R)
        live = row < rows
        mask = value_mask(place, live, size, cols, P, RAGGED, W)
        x = decode_tile(
            codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
            high_unit, 0, BITS, P, RAGGED, W, False,
        )  # fmt: skip
        begin = row.to(tl.int64) * row_stride + start.to(tl.int64) * col_stride
        at = grad + begin[:, None] + i.to(tl.int64) * col_stride
        g = tl.load(at, mask, other=0).to(tl.float32)
        out = (g * slope(x, KIND)).to(dx.dtype.element_ty)
        to = (row.to(tl.int64) * cols + start)[:, None] + i
        tl.store(dx + to, out, mask)
        tl.store(y + to, value(x, KIND).to(y.dtype.element_ty), mask)
        total += tl.where(mask, out.to(tl.float32), 0.0)
    column = tl.program_id(0) * (P * size) + tl.arange(0, W)
    inside = (tl.arange(0, W) < P * size) & (column < cols)
    tl.store(partial + program.to(tl.int64) * cols + column, tl.sum(total, 0), inside)


@per_site()
def activation_pair_sum(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Callable[..., tuple[Tensor, ...]]:
    """grad * kind'(decoded), kind(decoded), and the column sums of the first in float32.

    The first two are (rows, cols) in grad's dtype.
    """
    empty = triton_schemas._activation_pair_sum(grad, codes, scales, bits, kind)
    make = outputs(*empty)
    rows, cols = grad.shape
    if grad.numel() == 0:

        def call_empty(*_: Any) -> tuple[Tensor, ...]:
            dx, y, total = make()
            return dx, y, total.zero_()

        return call_empty
    tiles = cut(codes, scales, bits, cols, few_elements(bits))
    if tiles is None or not handles(grad):
        return triton_schemas.activation_pair_sum
    _, per_row, *numbers = tiles.numbers
    bits, joined, ragged, height, width = tiles.constants
    numbers = [rows, *numbers, *grad.stride()]
    constants = bits, joined, ragged, height, width, kind
    tensors = grad, codes.contiguous(), scales.contiguous(), *empty
    arguments = *tensors, *numbers, 1, *constants
    most = programs_at_once(_pair, tiles.num_warps, arguments, grad.device, _PROGRAMS)
    # The programs of each unit of a row.
    programs, share = split(triton.cdiv(rows, height), triton.cdiv(most, per_row))
    # Rows are int32, which takes fewer registers. The last tiles may lie beyond the last row.
    if programs * share * height > 2**31:
        return triton_schemas.activation_pair_sum
    bound = *numbers, share, *constants
    launch = Launch(_pair, (per_row, programs), tiles.num_warps, bound)
    add = add_parts(programs, 1, cols)
    make = outputs(*empty, grad.new_empty((programs, 1, cols), dtype=torch.float32))

    def call(grad: Tensor, codes: Tensor, scales: Tensor, *_: Any) -> tuple[Tensor, ...]:
        dx, y, total, partial = make()
        launch(grad, codes.contiguous(), scales.contiguous(), dx, y, partial)
        add(partial, total, None)
        return dx, y, total

    return call
