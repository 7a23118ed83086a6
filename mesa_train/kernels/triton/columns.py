"""Triton: sums over the rows of a matrix, computed beside other work on the rows, in two launches.

In the first launch, each program processes its share of the rows and writes its own column sums
(parts). The second launch, in this file, adds the parts in order. There are no atomics. So the same
input gives the same bits on the same device.
"""
# ruff: noqa: ANN001, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch, compiled

# Elements of a tile, and programs per multiprocessor, at most. Together they keep enough loads in
# flight, and the parts stay at a few percent of the memory traffic.
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


def split(count: int, programs: int) -> tuple[int, int]:
    """(programs, tiles per program) for `count` tiles and at most so many programs."""
    share = triton.cdiv(count, programs)
    return triton.cdiv(count, share), share


def programs_at_once(
    kernel: Any,
    num_warps: int,
    arguments: tuple[Any, ...],
    device: torch.device,
    most: int = _PROGRAMS,
) -> int:
    """The programs of a kernel that a device runs at the same time.

    A grid with more programs runs in two waves, and the second wave leaves most of the device idle.
    On an NVIDIA GPU the number follows from the registers of the compiled kernel. They differ
    between GPUs and versions of Triton.

    Args:
        kernel: the Triton kernel. It is compiled if it has not been compiled before.
        num_warps: warps per program.
        arguments: arguments of the launch. The number of programs must not depend on them.
        device: the device of the tensors.
        most: programs per multiprocessor, at most.
    """
    if device.type == "cuda" and torch.version.hip is None:
        fit = fitting(compiled(kernel, num_warps, arguments), num_warps, _properties(device))
        most = min(most, fit)
    return most * multiprocessors(device)


def fitting(compiled_kernel: Any, num_warps: int, properties: Any) -> int:
    """The programs of a compiled kernel that fit on one multiprocessor of an NVIDIA GPU, 1 or more.

    Args:
        compiled_kernel: Triton's compiled kernel. Without a count of registers, 128 are assumed.
        num_warps: warps per program.
        properties: torch's properties of the device.
    """
    # Triton loads the kernel onto the device, and so counts its registers, when `run` is read.
    getattr(compiled_kernel, "run", None)
    registers = getattr(compiled_kernel, "n_regs", None) or 128
    shared = getattr(getattr(compiled_kernel, "metadata", None), "shared", 0)
    # A warp gets a multiple of 256 registers, and CUDA reserves 1 KiB of memory for each program.
    warp_registers = triton.cdiv(registers * 32, 256) * 256
    limits = (
        getattr(properties, "regs_per_multiprocessor", 65536) // (warp_registers * num_warps),
        getattr(properties, "max_threads_per_multi_processor", 1024) // (32 * num_warps),
        getattr(properties, "shared_memory_per_multiprocessor", 65536) // (shared + 1024),
    )
    return max(1, min(limits))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device."""
    if device.type == "cpu":  # Triton's interpreter
        return 1
    properties = _properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)
