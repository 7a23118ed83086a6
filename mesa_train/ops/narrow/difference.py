"""Differences of every pair (the distances of queries and keys in deformable attention).

A difference of two tensors saves nothing. If broadcasting makes the result at least eight times as large as
both tensors together, the result gets a stash of copies of both. So an operator that must save the result
exactly, such as the coordinates of `grid_sample`, saves the two small tensors.

With `recompute="linear"`, a matmul's output minus a small tensor is rebuilt: a Linear's output without its
bias (DoRA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.add import small_term
from mesa_train.ops.fallback import fallback
from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed

from .numbers import constants, of_numbers
from .positions import copied

_TIMES = 8


class Difference:
    """Recipe: the difference of two sources, as the forward computed it."""

    bitwise = True

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        left, right = [saved.value(source) for source in spec.sources]
        return (left - right).to(dtype)


_DIFFERENCE = Difference()


def sub(recorder: Recorder, func: Any, /, input: Any, other: Any, **kwargs: Any) -> Any:
    """Row of torch.sub, Tensor.sub and `-`."""
    output = fallback(recorder, func, (input, other), kwargs)
    if kwargs or not isinstance(input, Tensor):
        return output
    source = recorder.lineage.get(input)
    if source is not None and of_numbers(source) and isinstance(other, (int, float)):
        recipe = Recompute(torch.sub, (other,), {})
        recorder.lineage.set(output, Stash(recipe, (), (source,), cost=CHEAP, dtype=output.dtype))
        return output
    if not isinstance(other, Tensor):
        return output
    sources = () if output.requires_grad else constants(recorder, input, other, output)
    if sources:
        stash = Stash(_DIFFERENCE, (), sources, cost=CHEAP, dtype=output.dtype)
        recorder.lineage.set(output, stash)
        return output
    if (
        source is not None
        and source.cost == MATMUL
        and small_term(recorder, other, input.shape, output)
    ):
        stash = Stash(
            _DIFFERENCE, (), (source, copied(recorder, other)), cost=CHEAP, dtype=output.dtype
        )
        recorder.lineage.set(output, stash)
        return output
    if output.numel() < _TIMES * (input.numel() + other.numel()):
        return output
    rule = recorder.context.rules["mul", "left"]
    if (
        recorder.traced
        or not recorder.covers("mul", input, other)
        or rule.lossless
        or rule.limit < CHEAP
        or output.numel() * output.element_size() < rule.min_bytes
    ):
        return output
    # Copies, because PyTorch lets the user write to the two tensors.
    parts = tuple([uncompressed(part.detach().clone()) for part in (input, other)])
    stash = Stash(_DIFFERENCE, (), parts, cost=CHEAP, dtype=output.dtype)
    recorder.lineage.set(output, stash)
    return output
