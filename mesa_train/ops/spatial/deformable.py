"""torchvision's deformable convolution.

Saves the stash of the input (1 byte per element), shared with the convolution that predicts the
offsets from the same tensor. Also saves the weight itself. Offsets and mask stay uncompressed: they
are a few numbers per position. Codes are not possible for them, because the derivative jumps where
a sampling point crosses a pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative, kept_first
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, uncompressed


class DeformConv(Operator):
    """A deformable convolution.

    inputs: x, weight, offset, mask, bias.
    stashes: the same.
    static: the convolution's numbers.
    """

    @derivative("conv")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        tensors = [saved.get(i, grad.dtype) for i in range(5)]
        gradients = torch.ops.torchvision._deform_conv2d_backward(grad, *tensors, *static)
        return tuple([g if need else None for g, need in zip(gradients, needs, strict=True)])


def deform_conv(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *numbers: Any,
) -> Any:
    """Row of torch.ops.torchvision.deform_conv2d, which torchvision.ops.deform_conv2d calls."""
    tensors = (input, weight, offset, mask, bias)
    if not recorder.covers("conv", *tensors) or not input.numel():
        return NotImplemented
    x = recorder.keep(input, "conv", "input", (2, 3), label="deform_conv2d")
    kept = kept_first(recorder, x, *[uncompressed(t) for t in tensors[1:]])
    result = recorder.exactly(func, *tensors, *numbers)
    return DeformConv.apply(result, kept, numbers, *tensors)
