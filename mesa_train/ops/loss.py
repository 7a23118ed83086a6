"""Losses inside a model: cross entropy of class indices, and the mean squared error.

- cross_entropy saves the codes of the probabilities (1 byte per element); PyTorch saves their
  logarithms. If a matmul rebuilds the logits (`recompute="linear"`), it saves nothing.
- mse_loss saves the codes of the difference (1 byte per element); PyTorch saves both operands.

The codes have at least 8 bits, because their error enters every gradient of the model. Without
codes, PyTorch's own nodes are as small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Stash, uncompressed

from .base import Operator, derivative


class CrossEntropy(Operator):
    """The cross entropy of class indices.

    inputs: logits (N, C, ...).
    stashes: probabilities, target, the number of targets that count or None.
    static: ignored index, the dtype of the logits.
    """

    @derivative("loss")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        ignored, dtype = static
        target = saved[1]
        counts = target != ignored
        if saved.specs[2] is not None:
            # Without targets that count, the loss is NaN and PyTorch's gradient is 0.
            grad = grad / saved.get(2, grad.dtype).clamp(min=1)
        rows = torch.where(counts, grad, 0).unsqueeze(1)
        dx = saved.get(0, grad.dtype) * rows
        classes = target.masked_fill(~counts, 0).unsqueeze(1)
        return (dx.scatter_add_(1, classes, -rows).to(dtype),)


class SquaredError(Operator):
    """The squared error.

    inputs: x, target.
    stashes: x - target.
    static: the factor of the difference.
    """

    @derivative("loss")
    def backward(
        saved: Saved, factor: float, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dx = saved.get(0, grad.dtype) * (grad * factor)
        return dx if needs[0] else None, -dx if needs[1] else None


def cross_entropy(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Row of torch.nn.functional.cross_entropy with class indices."""
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or label_smoothing != 0
        or reduction not in ("mean", "sum", "none")
        or not recorder.covers("loss", input)
        or input.dim() < 2
        or not input.numel()
        or target.dtype is not torch.int64
        or target.dim() != input.dim() - 1
    ):
        return NotImplemented
    source = recorder.known(input, "loss", "input")
    if source is not None and source.cost != MATMUL and not source.exact():
        source = None  # codes of the probabilities are more precise than codes of the logits
    if source is None and recorder.lossless("loss", "input"):
        return NotImplemented
    # Autocast computes the loss in float32, and no part of it by itself. So the function is called.
    result = recorder.exactly(func, input, target, ignore_index=ignore_index, reduction=reduction)
    with torch.no_grad():
        if source is not None:
            recipe = Recompute(_probabilities, (), {})
            stash = Stash(
                recipe,
                (),
                (source,),
                cost=CHEAP,
                dtype=torch.promote_types(input.dtype, torch.float32),
            )
            recorder.report.add(recorder.context.name, "loss", "input", "rebuilt", 0, stash)
        else:
            within = (1,) if input.dim() == 2 else tuple(range(2, input.dim()))
            stash = recorder.keep(_probabilities(input), "loss", "input", within, "cross_entropy")
        count = (target != ignore_index).sum() if reduction == "mean" else None
    kept = (stash, uncompressed(target), None if count is None else uncompressed(count))
    return CrossEntropy.apply(result, kept, (ignore_index, input.dtype), input)


def _probabilities(logits: Tensor) -> Tensor:
    """The probabilities of the classes, at least in float32."""
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)


def mse_loss(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Any:
    """Row of torch.nn.functional.mse_loss of two tensors of one shape."""
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or reduction not in ("mean", "sum", "none")
        or not recorder.covers("loss", input, target)
        or input.shape != target.shape
        or input.dtype is not target.dtype
        or not input.numel()
        or recorder.lossless("loss", "input")
    ):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction)
    with torch.no_grad():
        difference = recorder.keep(input - target, "loss", "input", label="mse_loss")
    factor = 2 / input.numel() if reduction == "mean" else 2.0
    return SquaredError.apply(result, (difference,), factor, input, target)
