"""Softmax. Keeps the codes of its output (1 byte per element), which its derivative alone reads and
which the matmul behind it shares; never its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mesa_train.stash import Saved

from .base import Operator, derivative

if TYPE_CHECKING:
    from mesa_train.intercept import Interception


class Softmax(Operator):
    """inputs: x. stashes: the output. static: dim."""

    @derivative("softmax")
    def backward(saved: Saved, dim: int, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
        weighted = grad * saved.get(0, grad.dtype)
        return (weighted - saved.get(0, grad.dtype) * weighted.sum(dim, keepdim=True),)


def softmax(
    mode: Interception,
    func: Any,
    /,
    input: Tensor,
    dim: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Row of torch.softmax, Tensor.softmax and torch.nn.functional.softmax."""
    if dim is None or not mode.covers("softmax", input):
        return NotImplemented
    result = mode.exactly(func, input, dim, *args, **kwargs)
    stash = mode.keep(result, "softmax", "output")
    output = Softmax.apply(result, (stash,), dim, input)
    mode.lineage.set(output, stash)
    return output
