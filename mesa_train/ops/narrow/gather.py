"""Gathers along a dim (the fine level of QuadTree attention).

Saves the indices in the narrowest integer type that holds the size of the dim, and without the dims along
which they were expanded. PyTorch saves 8 bytes an index.

A gather may repeat elements, and then its result is larger than its input. If it is at least twice as
large, the input gets a stash, and the result is rebuilt from it. Otherwise the operator behind would code
the larger result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative, kept_first
from mesa_train.policy import VIEW
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash


class Gather(Operator):
    """A gather. inputs: x. stashes: the indices. static: dim, the shape of x."""

    @derivative("matmul")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dim, shape = static
        index = saved.get(0, torch.int64)
        return (grad.new_zeros(shape).scatter_add_(dim, index, grad),)


class Indices:
    """Recipe: int64 indices of a shape, from narrower integers.

    Args:
        shape: of the indices, expanded dims included.
    """

    __slots__ = ("shape",)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return saved.own(spec)[0].to(dtype).expand(self.shape)


class Gathered:
    """Recipe: the gather of the first source by the second source.

    Args:
        dim: of the gather.
    """

    __slots__ = ("dim",)

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        x, index = spec.sources
        return saved.value(x, dtype).gather(self.dim, saved.value(index, torch.int64))


def gather(recorder: Recorder, func: Any, /, input: Tensor, dim: int, index: Tensor) -> Any:
    """Row of torch.gather and Tensor.gather."""
    if (
        not recorder.covers("matmul", input)
        or recorder.lossless("matmul", "right")
        or not input.dim()
    ):
        return NotImplemented
    indices = _indices(recorder, index, input.shape[dim])
    kept = kept_first(recorder, indices)
    result = recorder.exactly(func, input, dim, index)
    output = Gather.apply(result, kept, (dim, tuple(input.shape)), input)
    source = recorder.lineage.get(input)
    if source is None and result.numel() >= 2 * input.numel():
        source = recorder.keep(input, "matmul", "right", label="gather")
    if source is not None:
        stash = Stash(Gathered(dim), (), (source, indices), cost=VIEW, dtype=result.dtype)
        recorder.lineage.set(output, stash)
    return output


def _indices(recorder: Recorder, index: Tensor, size: int) -> Stash:
    """The stash of indices below `size`."""
    known = recorder.lineage.get(index)
    if known is not None:
        return known
    # 0 < size in a dim with several elements: an expanded dim has stride 0.
    once = [
        slice(1) if n > 1 and step == 0 else slice(None)
        for n, step in zip(index.shape, index.stride(), strict=True)
    ]
    narrow = next(
        t
        for t in (torch.uint8, torch.int16, torch.int32, torch.int64)
        if size - 1 <= torch.iinfo(t).max
    )
    with torch.no_grad():
        own = index[tuple(once)].to(narrow)
    how = str(narrow).removeprefix("torch.")
    recorder.report.add(
        recorder.context.name, "gather", "index", how, own.numel() * own.element_size()
    )
    stash = Stash(Indices(tuple(index.shape)), (own,), cost=VIEW, dtype=torch.int64)
    recorder.lineage.set(index, stash)
    return stash
