"""Triton: sums over the rows of a matrix, computed beside other work on the rows, in two launches.

In the first launch, each program processes its share of the rows and writes its own column sums
(parts). The second launch, in this file, adds the parts in order. There are no atomics. So the same
input gives the same bits on the same device.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch

# Elements of a tile, and programs per multiprocessor. Together they keep enough loads in flight,
# and the parts stay at a few percent of the memory traffic.
_TILE = 2048
_PROGRAMS = 4
# Columns and parts that a program of the second launch reads at once.
_COLUMNS, _PARTS = 32, 64


@triton.jit
def _add(
    partial, first, second, parts, cols,
    SUMS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (c < cols)[None, :]
        at = (part * SUMS + which).to(tl.int64)[:, None] * cols + c[None, :]
        total += tl.load(partial + at, mask, other=0)
    out = tl.sum(total, 0)
    if which == 0:
        tl.store(first + c, out, c < cols)
    elif SUMS == 2:
        tl.store(second + c, out, c < cols)


def add_parts(parts: int, sums: int, cols: int) -> Launch:
    """The launch that adds the parts (parts, 1 or 2, cols) of one or two sums.

    Its arguments are the parts and two vectors (cols,) for the sums, or one vector and None.
    """
    grid = (triton.cdiv(cols, _COLUMNS), sums)
    return Launch(_add, grid, 4, (parts, cols, sums, _COLUMNS, _PARTS))


def tile(cols: int) -> tuple[int, int]:
    """(rows, columns) of a tile of whole rows."""
    width = max(triton.next_power_of_2(cols), 16)
    return max(1, min(_TILE // width, 16)), width


def split(count: int, device: torch.device) -> tuple[int, int]:
    """(programs, tiles per program) for a number of tiles."""
    share = triton.cdiv(count, _PROGRAMS * multiprocessors(device))
    return triton.cdiv(count, share), share


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """The number of programs that a device runs in parallel."""
    if device.type == "cpu":  # Triton's interpreter
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
