"""Activations whose derivative has two values: relu, relu6, hardtanh, leaky_relu, clamp, prelu.

- Each saves one bit per element, which selects the slope. PyTorch saves the input or the output.
- prelu also saves the stash of its input (1 byte per element), for the gradient of its slope.
- If the input has a stash, as a norm's output has, the output is rebuilt from that stash. So a
  convolution or Linear behind saves nothing.

Without codes (`bits=32`) the bit is worth saving only if the output is rebuilt. Otherwise PyTorch
saves a tensor that neighbouring functions save as well, and the call is left to PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.policy import CHEAP
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed
from mesa_train.stash.tensors import held
from mesa_train.utils.clamp_bounds import PASSES_AT_BOUNDS

from .base import InPlace, Operator, derivative, kept_first, outdated, writable, written

_nn = torch._C._nn


class Stepped(Operator):
    """An activation whose derivative has two values.

    inputs: x.
    stashes: one bit per element.
    static: the two slopes.
    """

    @derivative("activation")
    def backward(
        saved: Saved, slopes: tuple[float, float], needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        on, off = slopes
        dx = bitmask.apply(grad, saved[0], on - off)
        return (dx if off == 0 else dx + off * grad,)


class SteppedInPlace(InPlace, Stepped):  # type: ignore[misc]
    """`Stepped` that writes to its input."""


class PReLU(Operator):
    """A relu with a trained slope below 0.

    inputs: x, slope.
    stashes: one bit per element, x, slope.
    static: the shape that aligns the slope with x.
    """

    @derivative("activation")
    def backward(
        saved: Saved, shape: tuple[int, ...], needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        above = bitmask.apply(grad, saved[0])
        below = grad - above
        dx = above + below * saved.get(2, grad.dtype).view(shape) if needs[0] else None
        dslope = None
        if needs[1]:
            product = below * saved.get(1, grad.dtype)
            size = torch.Size(shape).numel()
            dslope = product.sum_to_size(shape).view(-1) if size > 1 else product.sum().view(1)
            dslope = dslope.view(saved[2].shape)
        return dx, dslope


class PReLUOutput:
    """Recipe: prelu of its source, with the slope."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        value = saved.value(spec.sources[0], spec.dtype)
        return F.prelu(value, saved.own(spec)[0].to(spec.dtype)).to(dtype)


PRELU_OUTPUT = PReLUOutput()


@dataclasses.dataclass(frozen=True)
class Steps:
    """An activation with two slopes.

    Attributes:
        function: computes the activation.
        function_: the same, in place.
        bits: of (recorder, x): the bits that select the first slope. The bits at the knots and at
            NaN are PyTorch's.
        slopes: the first and the second slope.
    """

    function: Callable[[Tensor], Tensor]
    function_: Callable[[Tensor], Tensor]
    bits: Callable[[Recorder, Tensor], Tensor]
    slopes: tuple[float, float] = (1.0, 0.0)


_RELU = Steps(
    torch.relu, torch.relu_, lambda recorder, x: recorder.bits(x, bitmask.encode_positive)
)
# PyTorch multiplies by this float32 value of 1/6 in every dtype.
_HARDSIGMOID = Steps(
    F.hardsigmoid,
    _nn.hardsigmoid_,
    lambda recorder, x: recorder.bits((x > -3) & (x < 3)),
    (0.1666666716337204, 0.0),
)


def relu(
    recorder: Recorder, func: Any, /, input: Tensor, inplace: bool = False, **kwargs: Any
) -> Any:
    """Row of torch.nn.functional.relu, torch.relu and Tensor.relu."""
    return NotImplemented if kwargs else _stepped(recorder, input, _RELU, inplace)


def relu6(recorder: Recorder, func: Any, /, input: Tensor, inplace: bool = False) -> Any:
    """Row of torch.nn.functional.relu6."""
    return hardtanh(recorder, func, input, 0.0, 6.0, inplace)


def hardtanh(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Any:
    """Row of torch.nn.functional.hardtanh, which nn.ReLU6 calls."""
    bounds = (min_val, max_val)
    steps = Steps(
        lambda x: F.hardtanh(x, *bounds),
        lambda x: F.hardtanh_(x, *bounds),
        lambda recorder, x: recorder.bits(~((x <= min_val) | (x >= max_val))),
    )
    return _stepped(recorder, input, steps, inplace)


def leaky_relu(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Any:
    """Row of torch.nn.functional.leaky_relu."""
    if inplace and negative_slope < 0:
        return NotImplemented  # PyTorch refuses the backward
    steps = Steps(
        lambda x: F.leaky_relu(x, negative_slope),
        lambda x: F.leaky_relu_(x, negative_slope),
        lambda recorder, x: recorder.bits(x > 0),
        (1.0, negative_slope),
    )
    return _stepped(recorder, input, steps, inplace)


def hardsigmoid(recorder: Recorder, func: Any, /, input: Tensor, inplace: bool = False) -> Any:
    """Row of torch.nn.functional.hardsigmoid."""
    return _stepped(recorder, input, _HARDSIGMOID, inplace)


def clamp(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    min: float | None = None,
    max: float | None = None,
) -> Any:
    """Row of torch.clamp between numbers."""
    numbers = all([b is None or isinstance(b, (int, float)) for b in (min, max)])
    if not numbers or (min is None and max is None):
        return NotImplemented

    def bits(recorder: Recorder, x: Tensor) -> Tensor:
        # As in PyTorch, the derivative is 0 at a NaN, and everywhere if a bound is NaN.
        above, below = (torch.ge, torch.le) if PASSES_AT_BOUNDS else (torch.gt, torch.lt)
        sides = [] if min is None else [above(x, min)]
        sides += [] if max is None else [below(x, max)]
        return recorder.bits(sides[0] & sides[-1])

    steps = Steps(lambda x: torch.clamp(x, min, max), lambda x: torch.clamp_(x, min, max), bits)
    return _stepped(recorder, input, steps, inplace=False)


def overwriting(row: Callable[..., Any]) -> Callable[..., Any]:
    """The row of the function with a trailing underscore."""

    def overwrites(
        recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return row(recorder, func, input, *args, **kwargs, inplace=True)

    return overwrites


def _stepped(recorder: Recorder, input: Tensor, steps: Steps, inplace: bool) -> Any:
    """Save the bits of an activation, and record how its output is rebuilt."""
    if not recorder.covers("activation", input):
        return NotImplemented
    source = recorder.known(input, "activation", "input")
    here = inplace and writable(input)
    if source is not None and inplace and outdated(source, input):
        source = None
    if source is None and recorder.lossless("activation", "input"):
        return NotImplemented
    with torch.no_grad():
        bits = steps.bits(recorder, input)
    recorder.report.add(recorder.context.name, "activation", "input", "1 bit", bits.numel())
    kept = kept_first(recorder, uncompressed(bits))
    if here:
        output = SteppedInPlace.apply(steps.function_, kept, steps.slopes, input)
    else:
        result = recorder.exactly(steps.function, input)
        output = Stepped.apply(result, kept, steps.slopes, input)
        if inplace:
            output = written(recorder, input, output)
    if source is not None:
        recipe = Recompute(steps.function, (), {})
        recorder.lineage.set(output, Stash(recipe, (), (source,), cost=CHEAP, dtype=output.dtype))
    return output


def prelu(recorder: Recorder, func: Any, /, input: Tensor, weight: Tensor) -> Any:
    """Row of torch.nn.functional.prelu."""
    if not recorder.covers("activation", input, weight) or recorder.lossless("activation", "input"):
        return NotImplemented
    x = recorder.keep(input, "activation", "input")
    with torch.no_grad():
        bits = recorder.bits(input > 0)
    recorder.report.add(recorder.context.name, "activation", "input", "1 bit", bits.numel())
    kept = kept_first(recorder, uncompressed(bits), x, uncompressed(weight))
    result = recorder.exactly(func, input, weight)
    shape = [1] * input.dim()
    if input.dim() > 1:
        shape[1] = weight.numel()
    output = PReLU.apply(result, kept, tuple(shape), input, weight)
    stash = Stash(PRELU_OUTPUT, (held(weight),), (x,), cost=CHEAP, dtype=result.dtype)
    recorder.lineage.set(output, stash)
    return output
