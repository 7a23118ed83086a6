"""Max pooling, and the largest or smallest element along one dim with its index.

Saves the index of each chosen element within its window: 1 byte per element of the output, or 2 or
4 bytes for windows of more than 256 or 32,768 elements. PyTorch saves an int64 index, and max
pooling also saves its input. If the input has a stash, the output is rebuilt from the stash and the
indices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train.ops.base import Operator, derivative
from mesa_train.policy import CHEAP
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed
from mesa_train.stash.tensors import autocasts

_aten = torch.ops.aten
_POOLS = {2: _aten.max_pool2d_with_indices, 3: _aten.max_pool3d_with_indices}
_BACKWARDS = {
    2: _aten.max_pool2d_with_indices_backward,
    3: _aten.max_pool3d_with_indices_backward,
}


class MaxPool(Operator):
    """Max pooling over two or three dims.

    inputs: x.
    stashes: the index of each chosen element within its window.
    static: the shape and strides of x, `Windows`.
    """

    @derivative("extremum")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, strides, windows = static
        # PyTorch's backward reads the size and the memory format of the input, but no element.
        x = torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device)
        indices = windows.indices(saved[0].view(grad.shape), shape)
        backward = _BACKWARDS[len(windows.kernel)]
        return (backward(grad, x, *windows.numbers, indices),)


class Selected(Operator):
    """The largest or smallest element along one dim.

    inputs: x.
    stashes: the index of each chosen element.
    static: the shape of x, dim, keepdim.
    """

    @derivative("extremum")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, dim, keepdim = static
        if not keepdim:
            grad = grad.unsqueeze(dim)
        indices = saved[0].to(torch.int64)
        return (grad.new_zeros(shape).scatter_(dim, indices, grad),)


class Windows:
    """The numbers of a pooling, one number per dim.

    `kernel`: the size of a window. `numbers`: kernel, stride, padding, dilation, ceil_mode.
    """

    def __init__(self, dims: int, kernel: Any, *numbers: Any, ceil_mode: bool) -> None:
        stride, padding, dilation = numbers
        self.kernel = _each(kernel, dims)
        self.stride = _each(stride, dims) if stride not in (None, (), []) else self.kernel
        self.padding, self.dilation = _each(padding, dims), _each(dilation, dims)
        self.numbers = (self.kernel, self.stride, self.padding, self.dilation, ceil_mode)

    def within(self, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Indices within the windows, from indices into the spatial dims of `shape`."""
        found = torch.zeros_like(indices)
        for dim, position in self._positions(indices, shape):
            found.mul_(self.kernel[dim]).add_(
                (position - self._start(indices, dim)).div_(
                    self.dilation[dim], rounding_mode="floor"
                )
            )
        return found.to(smallest(math.prod(self.kernel)))

    def indices(self, within: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The int64 indices that `within` was called with."""
        rest, found, factor = within.to(torch.int64), torch.zeros_like(within, dtype=torch.int64), 1
        for dim in reversed(range(len(self.kernel))):
            offset = rest % self.kernel[dim]
            rest = rest.div(self.kernel[dim], rounding_mode="floor")
            position = offset.mul_(self.dilation[dim]).add_(self._start(found, dim))
            found.add_(position.mul_(factor))
            factor *= shape[dim - len(self.kernel)]
        return found

    def _positions(self, indices: Tensor, shape: tuple[int, ...]) -> list[tuple[int, Tensor]]:
        """(dim, position along dim) of flat indices, from the first dim to the last."""
        found, rest = [], indices
        for dim in reversed(range(len(self.kernel))):
            size = shape[dim - len(self.kernel)]
            found.append((dim, rest % size))
            rest = rest.div(size, rounding_mode="floor")
        return found[::-1]

    def _start(self, indices: Tensor, dim: int) -> Tensor:
        """The position of each window's first element along `dim`."""
        spatial = len(self.kernel)
        starts = torch.arange(indices.shape[dim - spatial], device=indices.device)
        starts = starts * self.stride[dim] - self.padding[dim]
        return starts.view(-1, *[1] * (spatial - 1 - dim))


class Pooled:
    """Recipe: the chosen elements of the source."""

    def __init__(self, windows: Windows, shape: tuple[int, ...]) -> None:
        self.windows, self.shape = windows, shape

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        spatial = len(self.windows.kernel)
        within = saved.own(spec)[0]
        indices = self.windows.indices(within, self.shape)
        flat = saved.value(spec.sources[0], dtype).flatten(-spatial)
        return flat.gather(-1, indices.flatten(-spatial)).view(within.shape)


class Chosen:
    """Recipe: the chosen element of the source along `dim`."""

    def __init__(self, dim: int, keepdim: bool) -> None:
        self.dim, self.keepdim = dim, keepdim

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        indices = saved.own(spec)[0].to(torch.int64)
        value = saved.value(spec.sources[0], dtype).gather(self.dim, indices)
        return value if self.keepdim else value.squeeze(self.dim)


def smallest(size: int) -> torch.dtype:
    """The smallest dtype of indices below `size`."""
    return torch.uint8 if size <= 256 else torch.int16 if size <= 32768 else torch.int32


def max_pool(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Row of max_pool2d and max_pool3d of torch and torch.nn.functional."""
    spatial = 2 if func in (torch.max_pool2d, F.max_pool2d) else 3
    if (
        return_indices
        or _widened(input, spatial)
        or not recorder.covers("extremum", input)
        or not input.numel()
        or input.dim() not in (spatial + 1, spatial + 2)
    ):
        return NotImplemented
    windows = Windows(spatial, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    shape = tuple(input.shape)
    result, indices = recorder.exactly(_POOLS[spatial], input, *windows.numbers)
    with torch.no_grad():
        within = windows.within(indices, shape)
    _report(recorder, within)
    static = (shape, input.stride(), windows)
    output = MaxPool.apply(result, (uncompressed(within),), static, input)
    source = recorder.known(input, "extremum", "mask")
    if source is not None:
        recorder.lineage.set(
            output,
            Stash(Pooled(windows, shape), (within,), (source,), cost=CHEAP, dtype=result.dtype),
        )
    return output


def selected(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """Row of torch.max and torch.min along one dim."""
    if (
        kwargs
        or not isinstance(dim, int)
        or not recorder.covers("extremum", input)
        or not input.numel()
        or not input.dim()
    ):
        return NotImplemented
    dim %= input.dim()
    result = recorder.exactly(func, input, dim, keepdim)
    indices = result.indices if keepdim else result.indices.unsqueeze(dim)
    within = indices.to(smallest(input.shape[dim]))
    _report(recorder, within)
    static = (tuple(input.shape), dim, keepdim)
    output = Selected.apply(result.values, (uncompressed(within),), static, input)
    source = recorder.known(input, "extremum", "mask")
    if source is not None:
        recipe = Chosen(dim, keepdim)
        recorder.lineage.set(
            output, Stash(recipe, (within,), (source,), cost=CHEAP, dtype=output.dtype)
        )
    return type(result)((output, result.indices))


def _widened(input: Tensor, spatial: int) -> bool:
    """True if a CPU's autocast pools in float32, as it does over three dims."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    return spatial == 3 and input.device.type == "cpu" and half and autocasts("cpu")


def _report(recorder: Recorder, within: Tensor) -> None:
    how = f"{8 * within.element_size()} bits"
    recorder.report.add(
        recorder.context.name, "extremum", "mask", how, within.numel() * within.element_size()
    )


def _each(value: Any, dims: int) -> list[int]:
    """A number or sequence as a list of one number per dim."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
