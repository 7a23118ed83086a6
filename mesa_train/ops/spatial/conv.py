"""Convolutions of one, two or three dims, also grouped, depthwise and transposed.

Saves the stash of the input: 1 byte per element. Nothing is saved behind a norm or an activation,
or if another operator saves the same tensor. Also saves the weight itself. Codes follow the memory
format: along the channels in channels-last, else along the positions of one channel.

If matmuls are recomputed (`recompute="linear"`), the output of a convolution of one position is
rebuilt like a Linear's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative, kept_first
from mesa_train.policy import MATMUL
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash


class Conv(Operator):
    """A convolution.

    inputs: x, weight, bias.
    stashes: x, weight.
    static: the shapes of x and weight, the size of the bias, and the convolution's numbers.
    """

    @derivative("conv")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, weight_shape, bias_size, numbers = static
        # Of an operand whose values are not needed, only the shape is used.
        x = saved.get(0, grad.dtype) if needs[1] else grad.new_empty(()).expand(shape)
        weight = saved.get(1, grad.dtype) if needs[0] else grad.new_empty(weight_shape)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, bias_size, *numbers, [needs[0], needs[1], needs[2]]
        )


class Pointwise:
    """Recipe: a convolution of one position again, from its input's stash.

    It is a matmul over the channels.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        parameters = [p.to(spec.dtype) for p in saved.own(spec)]
        value = saved.value(spec.sources[0], spec.dtype)
        return self.function(value, *parameters).to(dtype)


def conv(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Row of torch.nn.functional.conv1d, conv2d and conv3d."""
    spatial = weight.dim() - 2
    if (
        not recorder.covers("conv", input, weight, bias)
        or input.dim() != weight.dim()
        or not input.numel()
    ):
        return NotImplemented
    strides, dilations = _each(stride, spatial), _each(dilation, spatial)
    kernel = weight.shape[2:]
    if padding == "valid":
        paddings = [0] * spatial
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if any([t % 2 for t in totals]):
            return NotImplemented
        paddings = [t // 2 for t in totals]
    else:
        paddings = _each(padding, spatial)
    within = tuple(range(2, input.dim()))
    x = recorder.keep(input, "conv", "input", within) if weight.requires_grad else None
    kept = kept_first(recorder, x, recorder.weight(weight) if input.requires_grad else None)
    result = recorder.exactly(func, input, weight, bias, stride, padding, dilation, groups)
    numbers = (strides, paddings, dilations, False, [0] * spatial, groups)
    bias_size = None if bias is None else [bias.shape[0]]
    static = (tuple(input.shape), tuple(weight.shape), bias_size, numbers)
    output = Conv.apply(result, kept, static, input, weight, bias)
    if not recorder.context.rules.rebuilds_matmuls:
        return output
    if set(kernel) == set(strides) == {1} and groups == 1 and not any(paddings):
        source = recorder.known(input, "conv", "input") if x is None else x
        if source is not None and source.cost < MATMUL:
            parameters = recorder.parameters(weight, bias)
            recipe = Stash(Pointwise(func), parameters, (source,), cost=MATMUL, dtype=result.dtype)
            recorder.lineage.set(output, recipe)
    return output


def conv_transpose(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Row of torch.nn.functional.conv_transpose1d, conv_transpose2d and conv_transpose3d."""
    spatial = weight.dim() - 2
    if (
        not recorder.covers("conv", input, weight, bias)
        or input.dim() != weight.dim()
        or not input.numel()
    ):
        return NotImplemented
    within = tuple(range(2, input.dim()))
    label = "conv_transpose"
    x = None
    if weight.requires_grad:
        x = recorder.keep(input, "conv", "input", within, label)
    kept = kept_first(recorder, x, recorder.weight(weight) if input.requires_grad else None)
    result = recorder.exactly(
        func, input, weight, bias, stride, padding, output_padding, groups, dilation
    )
    strides, paddings, dilations = [_each(n, spatial) for n in (stride, padding, dilation)]
    numbers = (strides, paddings, dilations, True, _each(output_padding, spatial), groups)
    bias_size = None if bias is None else [bias.shape[0]]
    static = (tuple(input.shape), tuple(weight.shape), bias_size, numbers)
    return Conv.apply(result, kept, static, input, weight, bias)


def _each(value: Any, dims: int) -> list[int]:
    """A number or sequence as a list of one number per dim."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
