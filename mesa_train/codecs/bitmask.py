"""Bit masks: one bit per element, for the mask of a ReLU, a dropout or a select. Lossless."""

import torch
from torch import Tensor

from mesa_train import kernels

_ops = torch.ops.mesa_train


def encode(mask: Tensor) -> Tensor:
    """Code a bool mask of any shape as uint8 (ceil(numel / 8),), row-major, low bit first."""
    kernels.load()
    return _ops.bitmask_encode.default(mask)


def encode_positive(x: Tensor) -> Tensor:
    """The bits of x > 0, in one pass. A NaN counts as positive."""
    kernels.load()
    return _ops.bitmask_positive.default(x)


def apply(grad: Tensor, bits: Tensor, scale: float = 1.0) -> Tensor:
    """grad * scale if the bit is set, and 0 otherwise, with grad's shape and strides."""
    kernels.load()
    return _ops.bitmask_apply.default(grad, bits, scale)


def decode(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of `shape`."""
    return apply(torch.ones(shape, dtype=torch.uint8, device=bits.device).float(), bits) > 0
