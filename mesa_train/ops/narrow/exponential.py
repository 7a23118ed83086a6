"""The exponential.

Saves its output in 2 bytes per element, and the matmul behind shares them. 8-bit codes are too coarse:
the derivative of log(1 + exp(x)) needs the small elements as exactly as the large ones, and codes of 8
bits give it an error of 51 % (docs/fallback.md). An output in half precision is saved as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mesa_train.codecs.narrow import Narrow
from mesa_train.ops.base import Operator, derivative
from mesa_train.stash.recorder import Recorder, why_uncompressed
from mesa_train.stash.stash import MatrixLayout, Saved, Stash, uncompressed

_NARROW = Narrow()


class Exp(Operator):
    """The exponential. inputs: x. stashes: the output."""

    @derivative("activation")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        return (grad * saved.get(0, grad.dtype),)


def exp(recorder: Recorder, func: Any, /, input: Tensor, **kwargs: Any) -> Any:
    """Row of torch.exp and Tensor.exp."""
    if (
        kwargs
        or not recorder.covers("activation", input)
        or recorder.lossless("activation", "output")
    ):
        return NotImplemented
    result = recorder.exactly(func, input)
    y = _stash(recorder, result)
    output = Exp.apply(result, (y,), None, input)
    recorder.lineage.set(output, y)
    return output


def _stash(recorder: Recorder, result: Tensor) -> Stash:
    """The output in bfloat16, or uncompressed if it is small or in half precision."""
    reason = why_uncompressed(result, recorder.context.rules["activation", "output"])
    if result.dtype.itemsize < 4:
        reason = reason or f"dtype {str(result.dtype).removeprefix('torch.')}"
    if reason:
        size = result.numel() * result.element_size()
        how = f"uncompressed: {reason}"
        recorder.report.add(recorder.context.name, "exp", "output", how, size)
        return uncompressed(result)
    codec = recorder.in_checkpoint(_NARROW)
    layout, matrix = MatrixLayout.of(result, (-1,))
    codes = codec.encode(matrix)
    return recorder.leaf(codec, codes, layout, result.dtype, "activation", "output", "exp")
