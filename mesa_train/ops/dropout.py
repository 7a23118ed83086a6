"""Dropout.

Saves one bit per element; PyTorch saves a bool (GPU) or a number (CPU). The mask comes from the
same stream of the global generator as PyTorch's. The output is rebuilt from the input's stash and
the bits, so a Linear behind saves nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mesa_train.codecs import bitmask
from mesa_train.policy import CHEAP
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed

from .base import Operator, derivative


class Dropout(Operator):
    """Dropout.

    inputs: x.
    stashes: one bit per element.
    static: 1 / (1 - p).
    """

    @derivative("dropout")
    def backward(
        saved: Saved, scale: float, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        return (bitmask.apply(grad, saved[0], scale),)


class Dropped:
    """Recipe: the scaled source where its bit is set, else 0."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        value = saved.value(spec.sources[0], spec.dtype)
        return bitmask.apply(value, saved.own(spec)[0], self.scale).to(dtype)


def dropout(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    **kwargs: Any,
) -> Any:
    """Row of torch.nn.functional.dropout and torch.dropout.

    torch.dropout calls `training` `train`.
    """
    training = kwargs.pop("train", training)
    if not training or p == 0:
        return func(input, p, training)
    if inplace or not 0 < p < 1 or not recorder.covers("dropout", input) or not input.numel():
        return NotImplemented
    scale = 1 / (1 - p)
    with torch.no_grad():
        if input.device.type == "cpu":
            # The same steps as PyTorch's own dropout on the CPU: the same draws and the same
            # rounding.
            noise = torch.empty_like(input).bernoulli_(1 - p)
            mask = noise != 0
            if not torch.compiler.is_compiling():
                scale = _rounded(p, input.dtype)
            result = input * noise.div_(1 - p)
        else:
            result, mask = torch.native_dropout(input, p, True)
        bits = recorder.bits(mask)
    recorder.report.add(recorder.context.name, "dropout", "mask", "1 bit", bits.numel())
    output = Dropout.apply(result, (uncompressed(bits),), scale, input)
    source = recorder.lineage.get(input)
    if source is not None:
        recorder.lineage.set(
            output, Stash(Dropped(scale), (bits,), (source,), cost=CHEAP, dtype=result.dtype)
        )
    return output


@functools.cache
def _rounded(p: float, dtype: torch.dtype) -> float:
    """1 / (1 - p) as the CPU's dropout computes it: rounded to the dtype of the input."""
    with _disable_current_modes():
        return torch.ones((), dtype=dtype).div_(1 - p).item()
