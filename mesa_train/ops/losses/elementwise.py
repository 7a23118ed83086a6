"""Losses of single elements: logsigmoid, binary cross entropy, and the errors of two tensors.

- logsigmoid: codes of sigmoid(-x), or nothing if a matmul rebuilds x. PyTorch saves x, and on a CPU
  a second tensor.
- binary_cross_entropy_with_logits: codes of probability minus target. PyTorch saves both operands.
- mse_loss, smooth_l1_loss, huber_loss: codes of the difference, or of the clamped difference.
  PyTorch saves both operands.
- l1_loss: two bits per element, for a positive and for a negative difference.

All codes take 1 byte per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.ops.base import Operator, derivative
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, uncompressed

from .derivative import REDUCTIONS, Loss, derived, rebuilt, rooted, wide


class AbsoluteError(Operator):
    """The absolute error.

    inputs: x, target.
    stashes: the bits of x > target, the bits of x < target.
    static: the factor of the sign, the shape and the dtype of x.
    """

    @derivative("loss")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        factor, shape, dtype = static
        grad = grad.to(dtype).expand(shape).contiguous()
        dx = bitmask.apply(grad, saved[0], factor) - bitmask.apply(grad, saved[1], factor)
        return dx if needs[0] else None, -dx if needs[1] else None


def logsigmoid(recorder: Recorder, func: Any, /, input: Tensor) -> Any:
    """Row of torch.nn.functional.logsigmoid."""
    if not recorder.covers("loss", input):
        return NotImplemented
    source = rebuilt(recorder, input)
    if source is None and recorder.lossless("loss", "input"):
        return NotImplemented
    result = recorder.exactly(func, input)
    if source is not None:
        stash = derived(recorder, _FALLING, (source,), input.dtype, "logsigmoid")
    else:
        with torch.no_grad():
            stash = rooted(recorder, _falling(wide(input)), label="logsigmoid")
    return Loss.apply(result, (stash,), (1.0, (), input.dtype), input, None)


def _falling(x: Tensor) -> Tensor:
    """The derivative of logsigmoid."""
    return torch.sigmoid(-x)


_FALLING = Recompute(_falling, (), {})


def binary_cross_entropy_with_logits(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Any:
    """Row of torch.nn.functional.binary_cross_entropy_with_logits."""
    if (
        size_average is not None
        or reduce is not None
        or not _pairs(recorder, input, target, reduction)
        or any([t is not None and t.requires_grad for t in (target, weight, pos_weight)])
    ):
        return NotImplemented
    result = recorder.exactly(
        func, input, target, weight, reduction=reduction, pos_weight=pos_weight
    )
    with torch.no_grad():
        x, y = wide(input), wide(target)
        dx = torch.sigmoid(x) - y
        if pos_weight is not None:
            dx = dx + y * (1 - pos_weight) * torch.sigmoid(-x)
        if weight is not None:
            dx = dx * weight
        stash = rooted(recorder, dx, label="binary_cross_entropy_with_logits")
    static = (_share(input, reduction), (), input.dtype)
    return Loss.apply(result, (stash,), static, input, None)


def _pairs(recorder: Recorder, input: Tensor, target: Tensor, reduction: str) -> bool:
    """True if a loss of two tensors of one shape is to be recorded."""
    return (
        reduction in REDUCTIONS
        and recorder.covers("loss", input, target)
        and input.shape == target.shape
        and input.dtype is target.dtype
        and input.numel() > 0
        and not recorder.lossless("loss", "input")
    )


def _share(input: Tensor, reduction: str) -> float:
    """The factor by which a reduction multiplies each element of a loss."""
    return 1 / input.numel() if reduction == "mean" else 1.0


def _error(recorder: Recorder, result: Tensor, of: Any, factor: float, label: str, x: Any) -> Any:
    """A loss whose derivative is a function `of` the difference of the two tensors `x`."""
    input, target = x
    with torch.no_grad():
        stash = recorder.keep(of(input - target), "loss", "input", label=label)
    return Loss.apply(result, (stash,), (factor, (), input.dtype), input, target)


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
        or not _pairs(recorder, input, target, reduction)
    ):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction)
    factor = 2 * _share(input, reduction)
    return _error(recorder, result, lambda d: d, factor, "mse_loss", (input, target))


def smooth_l1_loss(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Any:
    """Row of torch.nn.functional.smooth_l1_loss of two tensors of one shape."""
    if (
        size_average is not None
        or reduce is not None
        or beta <= 0
        or not _pairs(recorder, input, target, reduction)
    ):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction, beta=beta)
    factor = _share(input, reduction)
    return _error(
        recorder,
        result,
        lambda d: (d / beta).clamp_(-1, 1),
        factor,
        "smooth_l1_loss",
        (input, target),
    )


def huber_loss(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Any:
    """Row of torch.nn.functional.huber_loss of two tensors of one shape."""
    if weight is not None or delta <= 0 or not _pairs(recorder, input, target, reduction):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction, delta=delta)
    factor = _share(input, reduction)
    return _error(
        recorder, result, lambda d: d.clamp(-delta, delta), factor, "huber_loss", (input, target)
    )


def l1_loss(
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
    """Row of torch.nn.functional.l1_loss of two tensors of one shape."""
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or not _pairs(recorder, input, target, reduction)
    ):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction)
    with torch.no_grad():
        above, below = recorder.bits(input > target), recorder.bits(input < target)
    size = above.numel() + below.numel()
    recorder.report.add(recorder.context.name, "l1_loss", "input", "2 bits", size)
    static = (_share(input, reduction), tuple(input.shape), input.dtype)
    kept = (uncompressed(above), uncompressed(below))
    return AbsoluteError.apply(result, kept, static, input, target)
