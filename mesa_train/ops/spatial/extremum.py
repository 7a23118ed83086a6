"""Largest and smallest element along dims (query pooling in Hiera).

Saves one bit per element, which says whether the element equals the extremum. PyTorch saves the
input and the output. Codes are not possible, because the derivative compares the two. If the input
has a stash, the output is rebuilt from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.ops.base import Operator, derivative
from mesa_train.policy import CHEAP
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Stash, uncompressed


class Extremum(Operator):
    """The largest or smallest element along dims.

    inputs: x.
    stashes: one bit per element. No bit is set if the extremum is NaN.
    static: the shape of x, dims, keepdim.
    """

    @derivative("extremum")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, dims, keepdim = static
        if not keepdim:
            for dim in sorted([d % len(shape) for d in dims]):
                grad = grad.unsqueeze(dim)
        mask = bitmask.decode(saved[0], shape)
        # As PyTorch does: if no element equals the extremum, the count is 0 and the gradient NaN.
        return (grad * mask / mask.sum(dims, keepdim=True),)


def extremum(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    dim: Any = (),
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """Row of torch.amax and torch.amin."""
    if kwargs or not recorder.covers("extremum", input) or not input.numel() or not input.dim():
        return NotImplemented
    dims = [dim] if isinstance(dim, int) else list(dim) or list(range(input.dim()))
    result = recorder.exactly(func, input, dims, keepdim)
    with torch.no_grad():
        best = result if keepdim else func(input, dims, True)
        bits = recorder.bits(input == best)
    recorder.report.add(recorder.context.name, "extremum", "mask", "1 bit", bits.numel())
    output = Extremum.apply(
        result, (uncompressed(bits),), (tuple(input.shape), dims, keepdim), input
    )
    source = recorder.known(input, "extremum", "mask")
    if source is not None:
        recipe = Recompute(func, (dims, keepdim), {})
        recorder.lineage.set(output, Stash(recipe, (), (source,), cost=CHEAP, dtype=result.dtype))
    return output
