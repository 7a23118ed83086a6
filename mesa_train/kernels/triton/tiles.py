"""Tiles for the Triton kernels: how they are cut and decoded.

A row is cut into units. A unit is P neighbouring groups whose codes begin on a whole byte. P is 1,
unless the length of a group leaves a byte partly filled (197 keys in two groups at 4 bits). A tile
is U units by W columns, and W is the next power of two. So the range of a group is a reduction
along the tile's fast dimension, and memory is read and written once, in order.

Codes of 6, 5 and 3 bits are two planes (`reference.py`). A tile reads or writes both planes.

Rounding is specified (`reference.py`). So every launch disables the fusion of products and sums
(`launch.py`). A kernel uses `tl.fma` explicitly if a single rounding is acceptable.
"""
# ruff: noqa: ANN001, ANN201 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesa_train.kernels import packing

# Elements of a tile: 32 per thread at 4 warps. This keeps enough loads in flight to hide the memory
# latency.
TILE = 4096
# The longest row of a tile. At 32 warps, a thread then holds 32 elements.
WIDEST = 32768
# The most units of a matrix, and columns of a row. The last tile may reach beyond them by less than
# WIDEST, and its indices must fit an int32.
_LAST = 2**31 - WIDEST

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tiles(NamedTuple):
    """The tiles of a coded matrix: `grid`, and the numbers of a kernel in the kernel's order."""

    grid: tuple[int]
    num_warps: int
    # units of the matrix, units per row, groups per row, columns per group, columns, code bytes per
    # row, the same in the plane of the low bits, code bytes per unit in the plane of the low bits and
    # in the plane of the high bits
    numbers: tuple[int, ...]
    # BITS, P, RAGGED (whether the last unit of a row is shorter), U, W
    constants: tuple[Any, ...]


def tiles(rows: int, cols: int, groups: int, bits: int, elements: int = TILE) -> Tiles | None:
    """The tiles of (rows, cols) with `groups` groups per row; None if no tile fits.

    `elements`: of a tile, unless a unit is longer.
    """
    size = -(-cols // groups)
    planes = packing.planes(bits)
    per_byte = 8 // planes[-1]
    joined = 1 if groups == 1 else per_byte // math.gcd(size, per_byte)
    width = max(triton.next_power_of_2(joined * size), per_byte)
    per_row = -(-groups // joined)
    units = rows * per_row
    low_bytes = packing.code_bytes(cols, planes[0])
    code_bytes = packing.code_bytes(cols, bits)
    unit = [joined * size * plane // 8 for plane in planes]
    if per_row == 1:
        unit = [low_bytes, code_bytes - low_bytes]
    if width > WIDEST or max(units, cols) > _LAST:
        return None
    height = max(1, elements // width)
    return Tiles(
        (triton.cdiv(units, height),),
        warps(height * width),
        (
            units,
            per_row,
            groups,
            size,
            cols,
            code_bytes,
            low_bytes,
            unit[0],
            unit[-1],
        ),
        (bits, joined, cols % (joined * size) != 0, height, width),
    )


def row_tiles(rows: int, cols: int, groups: int, bits: int) -> Tiles | None:
    """Tiles of whole rows, for kernels that need a sum along a row; None if a row does not fit.

    `numbers` are the numbers of `tiles`, with the rows of the matrix in the first place.
    `constants` are BITS, P, RAGGED, R, UNITS, W. A tile has R rows of UNITS units each.
    """
    cut = tiles(rows, cols, groups, bits)
    if cut is None:
        return None
    _, per_row, *rest = cut.numbers
    bits, joined, ragged, _, width = cut.constants
    units = triton.next_power_of_2(per_row)
    if units * width > WIDEST:
        return None
    height = max(1, TILE // 2 // (units * width))
    return Tiles(
        (triton.cdiv(rows, height),),
        warps(height * units * width),
        (rows, per_row, *rest),
        (bits, joined, ragged, height, units, width),
    )


def warps(elements: int) -> int:
    """Warps of a tile: 32 elements per thread, 4 to 32 warps."""
    return min(32, max(4, triton.next_power_of_2(elements // 1024)))


def handles(*tensors: Tensor | None) -> bool:
    """True if the kernels can read the dtypes of all tensors."""
    return all([t is None or t.dtype in _DTYPES for t in tensors])


@triton.jit
def locate(units, per_row, U: tl.constexpr):
    """(row, position in its row, whether the unit exists) of a tile's units."""
    unit = tl.program_id(0) * U + tl.arange(0, U)
    row = unit // per_row
    return row, unit - row * per_row, unit < units


@triton.jit
def locate_rows(rows, per_row, R: tl.constexpr, UNITS: tl.constexpr):
    """`locate` for the R * UNITS units of a tile of whole rows."""
    unit = tl.arange(0, R * UNITS)
    row = tl.program_id(0) * R + unit // UNITS
    place = unit % UNITS
    return row, place, (row < rows) & (place < per_row)


@triton.jit
def row_sum(x, R: tl.constexpr, UNITS: tl.constexpr):
    """The sum of each row of a tile (R * UNITS, W), repeated for each of the row's units."""
    total = tl.sum(tl.reshape(tl.sum(x, 1), (R, UNITS)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (R, UNITS)), (R * UNITS,))


@triton.jit
def low_bits(BITS: tl.constexpr):
    """The bits of the first plane of a code."""
    return 8 if BITS == 8 else (4 if BITS >= 4 else 2)


@triton.jit
def code_place(
    row, place, live, code_bytes, plane_bytes, unit_bytes,
    RAGGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Offsets (U, WIDTH) of a tile's code bytes in one plane, and which of these bytes exist.

    The offsets are multiples of the bytes per unit, and Triton derives whether that number is a
    multiple of 16. A division of columns would hide this, and each byte would be loaded separately.
    """
    b = tl.arange(0, WIDTH)[None, :]
    start = place * unit_bytes
    there = live[:, None] & (b < unit_bytes)
    if RAGGED:
        there = there & (start[:, None] + b < plane_bytes)
    return (row.to(tl.int64) * code_bytes + start)[:, None] + b, there


@triton.jit
def value_mask(place, live, size, cols, P: tl.constexpr, RAGGED: tl.constexpr, W: tl.constexpr):
    """Which of a tile's columns (U, W) exist."""
    i = tl.arange(0, W)[None, :]
    mask = live[:, None] & (i < P * size)
    if RAGGED:
        mask = mask & ((place * (P * size))[:, None] + i < cols)
    return mask


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """(U, bytes) uint8 to (U, codes) int32, low bits first."""
    wide = packed.to(tl.int32)
    if BITS == 8:
        return wide
    else:
        PER: tl.constexpr = 8 // BITS
        shifts = tl.arange(0, PER) * BITS
        parts = (wide[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
        return tl.reshape(parts, (packed.shape[0], packed.shape[1] * PER))


@triton.jit
def as_scale(stored):
    """The scale in float32: the low half of a group's stored pair."""
    return (stored << 16).to(tl.float32, bitcast=True)


@triton.jit
def as_zero(stored):
    """The zero in float32: the high half of a group's stored pair."""
    return (stored & -65536).to(tl.float32, bitcast=True)


@triton.jit
def mix(x):
    """The lowbias32 hash of uint32 values, https://nullprogram.com/blog/2018/07/31/."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def group_key(stored, index, seed):
    """The key of a group's draws. `index` is the group's index in its tensor."""
    which = index.to(tl.uint32) ^ seed.to(tl.uint32)
    return mix(stored.to(tl.uint32, bitcast=True) ^ mix(which))


@triton.jit
def draw(element, key):
    """16 drawn bits for each element, from its position in its group and the group's key."""
    return ((mix(element.to(tl.uint32)) >> 16) * (key & 0xFFFF | 1) + (key >> 16)) & 0xFFFF


@triton.jit
def dithered(q, stored, element, key, BITS: tl.constexpr):
    """Codes less their draws plus the mean draw, in float32. All of it is exact."""
    POINT: tl.constexpr = 16 - BITS
    # A scale of 2**96 or more: the group is decoded without its draws.
    drawn = tl.where((stored & 0xFFFF) >= 0x6F80, 0x8000, draw(element, key).to(tl.int32))
    shifted = ((q << POINT) - (drawn >> BITS)).to(tl.float32) + (2**POINT - 1) / 2
    return shifted * 2.0 ** (-POINT)


@triton.jit
def load_codes(
    codes, row, place, live, code_bytes, low_bytes, low_unit, high_unit,
    BITS: tl.constexpr, RAGGED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The codes (U, W) of a tile."""
    LOW: tl.constexpr = low_bits(BITS)
    WIDTH: tl.constexpr = W * LOW // 8
    at, there = code_place(row, place, live, code_bytes, low_bytes, low_unit, RAGGED, WIDTH)
    q = unpack(tl.load(codes + at, there, other=0), LOW)
    if BITS != LOW:
        HIGH_WIDTH: tl.constexpr = W * (BITS - LOW) // 8
        rest = code_bytes - low_bytes
        at, there = code_place(row, place, live, code_bytes, rest, high_unit, RAGGED, HIGH_WIDTH)
        high = unpack(tl.load(codes + low_bytes + at, there, other=0), BITS - LOW)
        q = q | (high << LOW)
    return q


@triton.jit
def decode_tile(
    codes, scales, row, place, live, groups, size, code_bytes, low_bytes, low_unit,
    high_unit, seed,
    BITS: tl.constexpr, P: tl.constexpr, RAGGED: tl.constexpr, W: tl.constexpr,
    DITHER: tl.constexpr,
):  # fmt: skip
    """The decoded values (U, W) in float32."""
    q = load_codes(
        codes, row, place, live, code_bytes, low_bytes, low_unit, high_unit, BITS, RAGGED, W,
    )  # fmt: skip
    i = tl.arange(0, W)[None, :]
    first = place * P
    pairs = scales.to(tl.pointer_type(tl.int32), bitcast=True)
    pairs += row.to(tl.int64) * groups + first
    stored = tl.load(pairs, live, other=0)[:, None]
    for p in tl.static_range(1, P):
        later = tl.load(pairs + p, live & (first + p < groups), other=0)[:, None]
        stored = tl.where(i >= p * size, later, stored)
    if DITHER:
        index = (row.to(tl.int64) * groups + first)[:, None]
        element = i
        if P > 1:
            index += i // size
            element = i % size
        value = dithered(q, stored, element, group_key(stored, index, seed), BITS)
    else:
        value = q.to(tl.float32)
    return value * as_scale(stored) + as_zero(stored)
