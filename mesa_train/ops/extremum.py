"""Largest and smallest element along dims (query pooling in Hiera).

Saves one bit per element, which says whether the element equals the extremum. PyTorch saves the
input and the output. Codes are not possible, because the derivative compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, uncompressed

from .base import Operator, derivative


class Extremum(Operator):
    """The largest or smallest element along dims.

    inputs: x.
    stashes: one bit per element, and the number of elements that equal the extremum.
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
        share = (grad / saved.get(1, grad.dtype)).expand(shape).contiguous()
        return (bitmask.apply(share, saved[0], 1.0),)


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
        mask = input == best
        count = mask.sum(dims, keepdim=True).to(input.dtype)
        # No element equals a NaN. PyTorch divides by this count of 0, and gives each element the
        # gradient NaN.
        bits, count = (
            recorder.bits(mask | best.isnan()),
            count.masked_fill_(best.isnan(), float("nan")),
        )
    recorder.report.add(recorder.context.name, "extremum", "mask", "1 bit", bits.numel())
    return Extremum.apply(
        result,
        (uncompressed(bits), uncompressed(count)),
        (tuple(input.shape), dims, keepdim),
        input,
    )
