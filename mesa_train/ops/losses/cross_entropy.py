"""The cross entropy: class indices, soft targets, label smoothing, class weights.

Saves codes of probability minus target (1 byte per element). PyTorch saves logarithms of the
probabilities, and soft targets. If a matmul rebuilds the logits (`recompute="linear"`), the cross
entropy of class indices saves the indices alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, uncompressed

from .derivative import REDUCTIONS, Loss, derived, rebuilt, rooted, wide


class CrossEntropyGradient:
    """Recipe: the derivative of the summed cross entropy of class indices, by the logits.

    The sources are the logits, the class indices, and the weights of the classes if there are any.
    """

    def __init__(self, ignored: int, smoothing: float) -> None:
        self.ignored, self.smoothing = ignored, smoothing

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return self.of(*[saved.value(source) for source in spec.sources]).to(dtype)

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
            given = [target] if weight is None else [target, weight]
            sources = (source, *[uncompressed(t) for t in given])
            stash = derived(recorder, recipe, sources, input.dtype, "cross_entropy")
        else:
            within = (1,) if input.dim() == 2 else tuple(range(2, input.dim()))
            if indices:
                dx = recipe.of(input, target, weight)
            else:
                dx = _of_soft_target(input, target, weight, label_smoothing)
            stash = rooted(recorder, dx, within, "cross_entropy")
        factor, count = 1.0, None
        if reduction == "mean" and indices:
            count = recipe.rows(target, weight, stash.dtype)[1].sum()
        elif reduction == "mean":
            factor = input.shape[1] / input.numel()
    kept = (stash, None if count is None else uncompressed(count))
    dims = (1,) if reduction == "none" else ()
    return Loss.apply(result, kept, (factor, dims, input.dtype), input, None)


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
