"""The cross entropy: class indices, soft targets, label smoothing, class weights.

Saves codes of probability minus target (1 byte per element). PyTorch saves logarithms of the
probabilities, and soft targets. If a matmul rebuilds the logits (`recompute="linear"`), the cross
entropy of class indices saves the indices alone, in the smallest dtype that holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.ops.base import Operator, derivative
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, uncompressed

from .derivative import REDUCTIONS, Loss, derived, rebuilt, rooted, wide


class CrossEntropy(Operator):
    """The cross entropy of class indices.

    inputs: logits (N, C, ...).
    stashes: the derivative of the summed loss by the logits, one bit per row (whether its target
        counts), the number that the mean divides by or None.
    static: the shape of the target, the dtype of the logits.
    """

    @derivative("loss")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, dtype = static
        if saved.specs[2] is not None:
            number = saved.get(2, grad.dtype)
            # Without targets that count, the loss is NaN and PyTorch's gradient is 0.
            grad = grad / number.masked_fill(number == 0, 1)
        # The gradient of a row that does not count is 0, also if `grad` is infinite.
        counts = bitmask.decode(saved[1], shape).unsqueeze(1)
        rows = torch.where(counts, grad.expand(shape).unsqueeze(1), 0)
        return ((saved.get(0, grad.dtype) * rows).to(dtype),)


class CrossEntropyGradient:
    """Recipe: the derivative of the summed cross entropy of class indices, by the logits.

    The sources are the logits, the class indices, and the weights of the classes if there are any.
    """

    def __init__(self, ignored: int, smoothing: float) -> None:
        self.ignored, self.smoothing = ignored, smoothing

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        logits, target, *weight = [saved.value(source) for source in spec.sources]
        return self.of(logits, target.to(torch.int64), *weight).to(dtype)

    def of(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The derivative, at least in float32."""
        result = _probabilities(logits)
        classes, share = self.rows(target, weight, result.dtype)
        hard = (1 - self.smoothing) * share
        if not self.smoothing:
            result = result * hard
        else:
            counts = (target != self.ignored).unsqueeze(1).to(result.dtype)
            weights = _weights(weight, logits, result.dtype) * (self.smoothing / logits.shape[1])
            result = result * (hard + counts * weights.sum()) - weights * counts
        return result.scatter_add(1, classes, -hard)

    def rows(
        self, target: Tensor, weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The class and the weight of each row; the weight of an ignored row is 0."""
        counts = target != self.ignored
        classes = target.masked_fill(~counts, 0)
        share = counts.to(dtype)
        if weight is not None:
            share = share * weight.to(dtype)[classes]
        return classes.unsqueeze(1), share.unsqueeze(1)


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
    """Row of torch.nn.functional.cross_entropy of a batch."""
    if (
        size_average is not None
        or reduce is not None
        or reduction not in REDUCTIONS
        or not recorder.covers("loss", input)
        or input.dim() < 2
        or not input.numel()
        or target.requires_grad
        or (weight is not None and weight.requires_grad)
    ):
        return NotImplemented
    indices = target.dtype is torch.int64 and target.dim() == input.dim() - 1
    if not indices and not (target.is_floating_point() and target.shape == input.shape):
        return NotImplemented
    source = rebuilt(recorder, input) if indices else None
    if source is None and recorder.lossless("loss", "input"):
        return NotImplemented
    # Autocast computes the loss in float32, and no part of it by itself. So the function is called.
    result = recorder.exactly(
        func,
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    recipe = CrossEntropyGradient(ignore_index, label_smoothing)
    with torch.no_grad():
        if source is not None:
            narrow = _narrow(target, input.shape[1], ignore_index)
            given = [narrow] if weight is None else [narrow, weight]
            sources = (source, *[uncompressed(t) for t in given])
            stash = derived(recorder, recipe, sources, input.dtype, "cross_entropy")
        else:
            within = (1,) if input.dim() == 2 else tuple(range(2, input.dim()))
            if indices:
                dx = recipe.of(input, target, weight)
            else:
                dx = _of_soft_target(input, target, weight, label_smoothing)
            stash = rooted(recorder, dx, within, "cross_entropy")
        counts = recorder.bits(target != ignore_index) if indices else None
        number = None
        if reduction == "mean" and indices:
            number = uncompressed(recipe.rows(target, weight, stash.dtype)[1].sum())
    if counts is None:
        share = input.shape[1] / input.numel() if reduction == "mean" else 1.0
        static = (share, (1,) if reduction == "none" else (), input.dtype)
        return Loss.apply(result, (stash,), static, input, None)
    kept = (stash, uncompressed(counts), number)
    return CrossEntropy.apply(result, kept, (tuple(target.shape), input.dtype), input)


def _narrow(target: Tensor, classes: int, ignored: int) -> Tensor:
    """The class indices in the smallest dtype that holds all classes and the ignored index."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if classes - 1 <= limits.max and limits.min <= ignored <= limits.max:
            return target.to(dtype)
    return target


def _of_soft_target(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> Tensor:
    """The derivative of the summed cross entropy of soft targets, by the logits."""
    p = _probabilities(logits)
    target = target.to(p.dtype)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / target.shape[1]
    if weight is not None:
        target = target * _weights(weight, logits, p.dtype)
    return p * target.sum(1, keepdim=True) - target


def _weights(weight: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of the classes, in a shape that broadcasts to the logits. Default: ones."""
    shape = [1, logits.shape[1]] + [1] * (logits.dim() - 2)
    if weight is None:
        return torch.ones(shape, dtype=dtype, device=logits.device)
    return weight.to(dtype).view(shape)


def _probabilities(logits: Tensor) -> Tensor:
    """The probabilities of the classes, at least in float32."""
    return torch.softmax(wide(logits), 1)
