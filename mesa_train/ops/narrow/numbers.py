"""Constants that a model makes of numbers: the labels 2 * eye - 1 of SigLIP's loss.

A product with such a constant saves the constant (PyTorch's rule). Here its stash is a recipe
without tensors: the function that made it runs again, so the constant takes no bytes. Multiples,
negatives, sums and differences of such constants are rebuilt too.

Cost: the backward makes the constant again for each product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import CHEAP
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash
from mesa_train.stash.tensors import is_plain


class Made:
    """Recipe: `function`, torch.eye or torch.ones, of `sizes` on `device`."""

    bitwise = True

    def __init__(self, function: Any, sizes: tuple[int, ...], device: torch.device) -> None:
        self.function, self.sizes, self.device = function, sizes, device

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        result: Tensor = self.function(*self.sizes, dtype=dtype, device=self.device)
        return result


def made(function: Any) -> Any:
    """Row of a function that makes a constant of numbers. `function`: torch.eye or torch.ones."""

    def row(recorder: Recorder, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        if (
            recorder.traced
            or output.requires_grad
            or not output.is_floating_point()
            or not is_plain(output)
            or not output.is_contiguous()
            or output.nbytes < recorder.context.rules["mul", "right"].min_bytes
        ):
            return output
        recipe = Made(function, tuple(output.shape), output.device)
        recorder.lineage.set(output, Stash(recipe, (), cost=CHEAP, dtype=output.dtype))
        return output

    return row


def constants(recorder: Recorder, input: Any, other: Any, output: Any) -> tuple[Stash, ...]:
    """The stashes of both terms of a sum or difference if no term has tensors, else ()."""
    if (
        not isinstance(input, Tensor)
        or not isinstance(other, Tensor)
        or output.requires_grad
        or input.shape != other.shape
        or input.dtype is not other.dtype
        or output is input
    ):
        return ()
    left, right = recorder.lineage.get(input), recorder.lineage.get(other)
    if left is None or right is None or not (of_numbers(left) and of_numbers(right)):
        return ()
    return left, right


def of_numbers(stash: Stash) -> bool:
    """True if a stash is rebuilt without tensors."""
    return not stash.tensors and all([of_numbers(source) for source in stash.sources])
