"""The node of a loss, which saves the derivative of the loss.

The backward of a loss multiplies the derivative by a number, or by a number for each row. So the
forward computes the derivative, and saves its codes (1 byte per element). PyTorch saves one or two
float tensors.

Probabilities differ by orders of magnitude. Their codes hold the square roots with the sign: small
elements keep their size beside a large one.

The codes have at least 8 bits, because their error enters every gradient of the model. Without
codes, PyTorch's own nodes are as small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative
from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash

REDUCTIONS = ("mean", "sum", "none")


class Loss(Operator):
    """A loss whose derivative is saved.

    inputs: x, the target (its derivative is the negative one; it may need no gradient).
    stashes: the derivative of the summed loss by x.
    static: the factor of the derivative, the dims that the loss has lost (() for a number), the
        dtype of x.
    """

    @derivative("loss")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        factor, dims, dtype = static
        for dim in dims:
            grad = grad.unsqueeze(dim)
        dx = (saved.get(0, grad.dtype) * (grad * factor)).to(dtype)
        return dx if needs[0] else None, -dx if needs[1] else None


class SignedSquare:
    """Recipe: the square of its source, with the sign of the source."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        root = saved.value(spec.sources[0])
        return (root.abs() * root).to(dtype)


_SQUARE = SignedSquare()


def rooted(
    recorder: Recorder, tensor: Tensor, within: tuple[int, ...] = (-1,), label: str = ""
) -> Stash:
    """The stash of a derivative or of probabilities: codes of the square roots, with the sign.

    Args:
        recorder: the recorder of the call.
        tensor: a float tensor that no other operator saves.
        within: as for `Recorder.keep`.
        label: the function's name in reports.
    """
    with torch.no_grad():
        root = recorder.keep(tensor.abs().sqrt_().copysign_(tensor), "loss", "input", within, label)
    return Stash(_SQUARE, (), (root,), cost=CHEAP, dtype=tensor.dtype)


def wide(tensor: Tensor) -> Tensor:
    """A tensor at least in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rebuilt(recorder: Recorder, input: Tensor) -> Stash | None:
    """The stash of a loss's input if the derivative is to be rebuilt from it, else None.

    Codes of a derivative are more precise than codes of the input. So the input's own codes do not
    count.
    """
    source = recorder.known(input, "loss", "input")
    return None if source is None or (source.cost != MATMUL and not source.exact()) else source


def derived(
    recorder: Recorder, recipe: Any, sources: tuple[Stash, ...], dtype: torch.dtype, label: str
) -> Stash:
    """A stash of a recipe over `sources`, reported as rebuilt, of a `dtype` at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    stash = Stash(recipe, (), sources, cost=CHEAP, dtype=dtype)
    recorder.report.add(recorder.context.name, label, "input", "rebuilt", 0, stash)
    return stash
