"""Products of two tensors that both need a gradient: layer scale, gates, SwiGLU.

Saves the stashes of both factors. A small or trained factor stays uncompressed. A Linear's output
times a layer scale saves no factor (see `linear.py`). A product with a constant saves the same
tensors as PyTorch. Each product is rebuilt from its factors. So rotary positions, an RMS norm of
single operations and SwiGLU hand the stash of their input on.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed
from mesa_train.stash.tensors import held, is_plain

from .base import Operator, derivative, distinct, kept_first, sum_to
from .linear import scaled
from .losses.log_softmax import weighted
from .narrow.positions import outer_product, times_table


class Mul(Operator):
    """An element-wise product.

    inputs: left, right.
    stashes: left, right.
    static: their shapes.
    """

    @derivative("mul")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        left_shape, right_shape = static
        dleft = sum_to(grad * saved[1], left_shape) if needs[0] else None
        dright = sum_to(grad * saved[0], right_shape) if needs[1] else None
        return dleft, dright


class Multiplied:
    """Recipe: the product of two sources."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        left, right = [saved.value(source) for source in spec.sources]
        return (left * right).to(dtype)


MULTIPLIED = Multiplied()
_NEG = Recompute(torch.neg, (), {})


def mul(recorder: Recorder, func: Any, /, input: Any, other: Any, **kwargs: Any) -> Any:
    """Row of torch.mul, Tensor.mul and `*`."""
    if kwargs:
        return NotImplemented
    if not isinstance(other, Tensor) or not isinstance(input, Tensor):
        output = func(input, other)
        tensor, number = (input, other) if isinstance(input, Tensor) else (other, input)
        source = recorder.lineage.get(tensor)
        if source is not None and isinstance(number, (int, float)) and output.is_floating_point():
            replay = Recompute(torch.mul, (number,), {})
            recorder.lineage.set(
                output, Stash(replay, (), (source,), cost=CHEAP, dtype=output.dtype)
            )
        elif (  # the argument of QuickGELU's sigmoid; the scales of attention are below 1
            type(number) is float and number > 1 and tensor.requires_grad and not recorder.traced
        ):
            recorder.multiples.set(output, (weakref.ref(tensor), tensor._version, number))
        return output
    if not (input.requires_grad and other.requires_grad):
        return _by_constant(recorder, func, input, other)
    if not recorder.covers("mul", input, other):
        return NotImplemented
    for product, scale in ((input, other), (other, input)):
        output = scaled(recorder, func, product, scale)
        if output is not NotImplemented:
            return output
    left, right = recorder.keep(input, "mul", "left"), recorder.keep(other, "mul", "right")
    kept = kept_first(recorder, left, right)
    result = recorder.exactly(func, input, other)
    output = Mul.apply(
        result, kept, (tuple(input.shape), tuple(other.shape)), *distinct(input, other)
    )
    # The backward of the product rebuilds both factors. So it recomputes no further matmul if the
    # product is rebuilt from recomputed matmuls.
    if max(left.cost, right.cost) < MATMUL or recorder.context.rules.rebuilds_matmuls:
        recorder.lineage.set(
            output, Stash(MULTIPLIED, (), (left, right), cost=CHEAP, dtype=result.dtype)
        )
    return output


def _by_constant(recorder: Recorder, func: Any, input: Tensor, other: Tensor) -> Tensor:
    """A product with a constant or a frozen parameter, such as the tables of rotary positions.

    PyTorch saves the constant; a table that is rebuilt is not saved (`positions.py`). The product is
    rebuilt from the stash of the other factor.
    """
    tracked, constant = (input, other) if input.requires_grad else (other, input)
    if not tracked.requires_grad:
        output = func(input, other)
        stash = outer_product(recorder, input, other, output, MULTIPLIED)
        if stash is not None:
            recorder.lineage.set(output, stash)
        return output
    output = weighted(recorder, func, tracked, constant, input, other)
    if output is not NotImplemented:
        return output
    output = times_table(recorder, func, tracked, constant, input, other)
    table = None if output is NotImplemented else recorder.lineage.get(constant)
    if output is NotImplemented:
        output = func(input, other)
    source = recorder.lineage.get(tracked)
    if (
        source is not None
        and constant.is_floating_point()
        and is_plain(constant)
        and output.shape == tracked.shape
    ):
        factor = held(constant) if isinstance(constant, torch.nn.Parameter) else constant
        sources = (source, table or uncompressed(factor))
        recorder.lineage.set(output, Stash(MULTIPLIED, (), sources, cost=CHEAP, dtype=output.dtype))
    return output


def div(recorder: Recorder, func: Any, /, input: Any, other: Any, **kwargs: Any) -> Any:
    """Row of torch.div, Tensor.div and `/`: a quotient by a number is rebuilt from its dividend."""
    if kwargs or not isinstance(input, Tensor) or not isinstance(other, (int, float)):
        return NotImplemented
    output = func(input, other)
    source = recorder.lineage.get(input)
    if source is not None and output.is_floating_point():
        replay = Recompute(torch.div, (other,), {})
        recorder.lineage.set(output, Stash(replay, (), (source,), cost=CHEAP, dtype=output.dtype))
    return output


def neg(recorder: Recorder, func: Any, /, input: Tensor, *args: Any) -> Any:
    """Row of negation, a part of rotary positions."""
    output = func(input, *args)
    source = recorder.lineage.get(input) if isinstance(input, Tensor) else None
    if source is not None and not args:
        recorder.lineage.set(output, Stash(_NEG, (), (source,), cost=CHEAP, dtype=output.dtype))
    return output


def mul_(recorder: Recorder, func: Any, /, input: Tensor, other: Any) -> Any:
    """Row of Tensor.mul_.

    Computes the product separately, and writes it back by autograd's own copy.
    """
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    made = recorder.linears.get(input)
    if made is None:
        return NotImplemented
    product = scaled(recorder, torch.mul, input, other)
    if product is NotImplemented:
        return NotImplemented
    if torch.compiler.is_compiling():
        recorder.lineage.clear()
        recorder.linears.clear()
    return input.copy_(product)
