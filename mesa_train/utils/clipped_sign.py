"""The sign of a tensor with a clipped straight-through gradient, as a function that modes can see.

PyTorch calls no torch function mode for a custom autograd function. `clipped_sign` asks for the mode
first, so mesa_train has a row for it (`ops/narrow/clipped_sign.py`). Without a mode the autograd function runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


class _ClippedSign(torch.autograd.Function):
    """Saves one bool an element."""

    @staticmethod
    def forward(y: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < 1
        return y.sign(), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        _, inside = output
        ctx.mark_non_differentiable(inside)
        ctx.save_for_backward(inside)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside


def clipped_sign(y: Tensor) -> Tensor:
    """The sign of `y`, with sign(0) = 0. The gradient passes where -1 < y < 1, and is 0 elsewhere.

    Args:
        y: any shape, floating point.
    Returns:
        -1, 0 or 1, in the shape and dtype of `y`.
    """
    if not torch.compiler.is_compiling() and has_torch_function_unary(y):
        output: Tensor = handle_torch_function(clipped_sign, (y,), y)
        return output
    return _ClippedSign.apply(y)[0]
