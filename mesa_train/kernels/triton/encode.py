"""Triton: affine codes of a tensor in one pass, rounded as `reference.py` specifies, bit for bit.

The input may have any strides. So the rows of q, k and v are read from the packed qkv without a
copy. A normalised input is computed in the same pass, so a norm's x_hat is never written to memory.
"""
# ruff: noqa: ANN001, ANN201, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import reference, schemas

from .launch import Launch, compiled, contiguous, outputs, per_site, signed
from .tiles import code_place, draw, group_key, handles, locate, low_bits, tiles, value_mask


@triton.jit
def _ordered(bits):
    """The bits of a float, mapped so that integers compare like the numbers.

    NaN and infinity are at the ends of this order, so one test per group finds them. The function
    is its own inverse.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def make_grid(low, high, LEVELS: tl.constexpr):
    """The grid of each group, from the ordered bits of its minimum and maximum.

    Returns:
        The stored pair (int32), zero and 1 / scale. Both are float32, and 0 for a group with a NaN
        or infinity.
    """
    LARGEST: tl.constexpr = 3.4028234663852886e38
    finite = (low > -0x7F800001) & (high < 0x7F800000)
    least = _ordered(low)
    down = least & -65536
    down = tl.where((low < 0) & (down != least), down + 65536, down)
    down = tl.where(down == -0x80000000, 0, down)  # -0.0
    down = tl.where(down == -0x800000, -0x810000, down)  # -infinity becomes the lowest bfloat16
    down = tl.where(finite, down, 0)
    zero = down.to(tl.float32, bitcast=True)

    most = tl.where(finite, _ordered(high), 0).to(tl.float32, bitcast=True)
    span = most - zero
    span = tl.where(span < LARGEST, span, LARGEST)
    step = tl.div_rn(span, tl.full(span.shape, LEVELS, tl.float32))
    up = (step.to(tl.int32, bitcast=True) + 0xFFFF) & -65536
    top = up.to(tl.float32, bitcast=True) * LEVELS + zero
    up = tl.where(tl.abs(top) <= LARGEST, up, up - 65536)
    up = tl.where(up < 0x00800000, 0, up)  # below the smallest normal number
    usable = finite & (up > 0)
    scale = tl.where(usable, up.to(tl.float32, bitcast=True), 1.0)
    inverse = tl.where(usable, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)
    return tl.where(finite, (up >> 16) | down, 0x7FC07FC0), zero, inverse


@triton.jit
def _packed(q, BITS: tl.constexpr):
    """(U, W) integers below 2**BITS to (U, bytes), low bits first."""
    if BITS == 8:
        return q
    else:
        PER: tl.constexpr = 8 // BITS
        parts = tl.reshape(q, (q.shape[0], q.shape[1] // PER, PER))
        return tl.sum(parts << (tl.arange(0, PER) * BITS)[None, None, :], 2)


@triton.jit
def encode_tile(
    value, mask, codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
    high_unit, seed,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Write the codes and scales of (U, W) float32 values."""
    LEVELS: tl.constexpr = 2**BITS - 1
    LOW: tl.constexpr = low_bits(BITS)
    i = tl.arange(0, W)[None, :]
    ordered = _ordered(value.to(tl.int32, bitcast=True))
    zero = tl.zeros((U, W), tl.float32)
    inverse = tl.zeros((U, W), tl.float32)
    keys = tl.zeros((U, W), tl.uint32)
    element = tl.zeros((U, W), tl.int32) + i
    pairs = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    first = place * P
    index = row.to(tl.int64) * groups + first
    for p in tl.static_range(P):
        inside = mask
        if P > 1:
            inside = mask & (i >= p * size) & (i < (p + 1) * size)
        low = tl.min(tl.where(inside, ordered, 0x7FFFFFFF), 1)
        high = tl.max(tl.where(inside, ordered, -0x80000000), 1)
        stored, group_zero, group_inverse = make_grid(low, high, LEVELS)
        tl.store(pairs + index + p, stored, live & (first + p < groups))
        zero = tl.where(inside, group_zero[:, None], zero)
        inverse = tl.where(inside, group_inverse[:, None], inverse)
        if STOCHASTIC:
            key = group_key(stored, index + p, seed)
            keys = tl.where(inside, key[:, None], keys)
            element = tl.where(inside, i - p * size, element)

    v = (value - zero) * inverse
    TOP: tl.constexpr = 65535 if STOCHASTIC else LEVELS
    if STOCHASTIC:
        v = v * 2.0 ** (16 - BITS)
    # A NaN becomes 0.
    v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.NONE)
    v = tl.minimum(v, TOP * 1.0, propagate_nan=tl.PropagateNan.NONE)
    # 1.5 * 2**23: the last place of the sum is 1, so the addition itself rounds half to even.
    q = (v + 12582912.0).to(tl.int32, bitcast=True) & 0xFFFF
    if STOCHASTIC:
        drawn = draw(element, keys)
        q = tl.minimum(q + (drawn >> BITS).to(tl.int32), 65535) >> (16 - BITS)

    if BITS != 8:
        q = tl.where(mask, q, 0)
    WIDTH: tl.constexpr = W * LOW // 8
    at, there = code_place(row, place, live, code_bytes, low_bytes, low_unit, RAGGED, WIDTH)
    tl.store(codes + at, _packed(q & (2**LOW - 1), LOW).to(tl.uint8), there)
    if BITS != LOW:
        HIGH: tl.constexpr = BITS - LOW
        HIGH_WIDTH: tl.constexpr = W * HIGH // 8
        rest = code_bytes - low_bytes
        at, there = code_place(row, place, live, code_bytes, rest, high_unit, RAGGED, HIGH_WIDTH)
        tl.store(codes + low_bytes + at, _packed(q >> LOW, HIGH).to(tl.uint8), there)


@triton.jit(do_not_specialize=["seed"])
def _encode(
    x, mean, rstd, codes, scales, seed,
    units, per_row, groups, size, cols, code_bytes, low_bytes, low_unit, high_unit,
    row_stride, col_stride,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    row, place, live = locate(units, per_row, U)
    mask = value_mask(place, live, size, cols, P, RAGGED, W)
    i = tl.arange(0, W)[None, :].to(tl.int64)
    begin = row.to(tl.int64) * row_stride + (place * (P * size)).to(tl.int64) * col_stride
    value = tl.load(x + begin[:, None] + i * col_stride, mask, other=0).to(tl.float32)
    if mean is not None:
        value = value - tl.load(mean + row, live, other=0).to(tl.float32)[:, None]
    if rstd is not None:
        value = value * tl.load(rstd + row, live, other=0).to(tl.float32)[:, None]
    encode_tile(
        value, mask, codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
        high_unit, seed,
        BITS, P, RAGGED, U, W, STOCHASTIC,
    )  # fmt: skip


def compile_one() -> None:
    """Compile the kernel for bfloat16 on the current device, without a launch.

    Raises:
        Exception: Triton cannot compile for the device.
    """
    cut = tiles(1, 64, 1, 8)
    assert cut is not None
    pointers = torch.bfloat16, None, None, torch.uint8, torch.bfloat16
    numbers = *cut.numbers, 64, 1
    compiled(_encode, cut.num_warps, (*pointers, 0, *numbers, *cut.constants, False))


def _launch(
    x: Tensor,
    means: tuple[Tensor | None, Tensor | None],
    scales: Tensor,
    bits: int,
    stochastic: bool,
) -> Launch | None:
    """The launch of the kernel, or None if it cannot read these tensors."""
    rows, cols = x.shape
    cut = tiles(rows, cols, scales.shape[1], bits)
    if cut is None or not handles(x, *means):
        return None
    bound = *cut.numbers, *x.stride(), *cut.constants, stochastic
    return Launch(_encode, cut.grid, cut.num_warps, bound)


@per_site(free=1)
def affine_encode(
    x: Tensor, bits: int, group_size: int, stochastic: bool, seed: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """(rows, cols) to codes (rows, bytes) uint8 and scales (rows, groups, 2) bfloat16."""
    empty = schemas._affine_encode(x, bits, group_size, stochastic, seed)
    make = outputs(*empty)
    if x.numel() == 0:
        return lambda *_: tuple(make())
    launch = _launch(x, (None, None), empty[1], bits, stochastic)
    if launch is None:
        return reference.affine_encode

    def call(x: Tensor, *code: Any) -> tuple[Tensor, Tensor]:
        codes, scales = make()
        launch(x, None, None, codes, scales, signed(code[-1]))
        return codes, scales

    return call


@per_site(free=1)
def normalized_encode(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Codes of (x - mean) * rstd, with one mean and one rstd per row. None: no mean."""
    empty = schemas._normalized_encode(x, mean, rstd, bits, group_size, stochastic, seed)
    make = outputs(*empty)
    if x.numel() == 0:
        return lambda *_: tuple(make())
    launch = _launch(x, (mean, rstd), empty[1], bits, stochastic)
    if launch is None:
        return reference.normalized_encode

    def call(x: Tensor, mean: Tensor | None, rstd: Tensor, *code: Any) -> tuple[Tensor, Tensor]:
        codes, scales = make()
        launch(x, contiguous(mean), rstd.contiguous(), codes, scales, signed(code[-1]))
        return codes, scales

    return call
