"""Vectors normalised to length one.

Saves the codes of the output (1 byte per element), which the matmul behind shares, and the lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, uncompressed
from mesa_train.utils.clamp_bounds import PASSES_AT_BOUNDS

from .base import Operator, aliases, derivative


class Normalize(Operator):
    """x / max(|x|, eps).

    inputs: x.
    stashes: the output, the norm.
    static: dim, eps.
    """

    @derivative("normalize")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dim, eps = static
        y, norm = saved.get(0, grad.dtype), saved.get(1, grad.dtype)
        clamped = norm < eps if PASSES_AT_BOUNDS else norm <= eps
        # Where |x| was clamped, the norm is constant, and y may be 0 / 0: this term is left out.
        along = y * (grad * y).sum(dim, keepdim=True)
        return ((grad - along.masked_fill_(clamped, 0)) / norm.clamp_min(eps),)


def normalize(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Any:
    """Row of torch.nn.functional.normalize with p=2 along one dim."""
    if (
        p != 2
        or out is not None
        or not isinstance(dim, int)
        or not recorder.covers("normalize", input)
    ):
        return NotImplemented
    result = recorder.exactly(func, input, p, dim, eps)
    norm = recorder.exactly(torch.linalg.vector_norm, input, 2, dim, True)
    y = recorder.keep(result, "normalize", "output")
    if not torch.compiler.is_compiling() and aliases(y, result):
        result = result.clone()  # PyTorch does not save its output, so the user may write to it
    output = Normalize.apply(result, (y, uncompressed(norm)), (dim, eps), input)
    recorder.lineage.set(output, y)
    return output
