"""Base class of the attention layers: the common signature, the checks, and attention in windows."""

from __future__ import annotations

import abc

import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn


class AttentionLayer(nn.Module, abc.ABC):
    """Map (B, H, W, dim) to the same shape. A subclass defines `mix`, `flops` and its modules.

    Args:
        dim: width.
        num_heads: must divide `dim`. Convolutions ignore it.
        height: rows of the map in tokens.
        width: columns of the map in tokens.
    Attributes:
        fixed_size: true if parameters depend on the size. Such a layer refuses all other sizes.
    Raises:
        ValueError: an argument is out of range, or an input has another width or a size that the
            layer cannot take. The message names the argument and the value.
    """

    fixed_size = False

    def __init__(self, dim: int, num_heads: int, height: int, width: int) -> None:
        super().__init__()
        self.kind = type(self).__name__
        for name, value in {
            "dim": dim, "num_heads": num_heads, "height": height, "width": width
        }.items():  # fmt: skip
            self.check_least(name, value, 1)
        self.check_multiple("dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{self.kind}: input must be a map (B, H, W, {self.dim}), got {tuple(x.shape)}"
            )
        height, width = x.shape[1:3]
        if self.fixed_size and (height, width) != self.size:
            raise ValueError(
                f"{self.kind}: built for maps of {self.size[0]}x{self.size[1]}, got "
                f"{height}x{width}"
            )
        self.check_size(height, width)
        return self.mix(x)

    @abc.abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """The layer's output for a map of a checked size."""

    @abc.abstractmethod
    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of one map by the rules of the published benchmark.

        Linear layers, convolutions and matmuls count without biases, norms 5 an element, bilinear
        samples 4 an element. Softmax, activations, poolings, sums and gathers do not count.
        """

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for a size that the layer cannot take. The base class takes any size."""

    def check_least(self, name: str, value: int, least: int) -> None:
        """Raise ValueError for a value below `least`."""
        if value < least:
            raise ValueError(f"{self.kind}: {name} must be at least {least}, got {value}")

    def check_multiple(self, name: str, value: int, of_name: str, of: int) -> None:
        """Raise ValueError unless `of` divides `value`."""
        if value % of:
            raise ValueError(f"{self.kind}: {name}={value} must be a multiple of {of_name}={of}")

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, dim), or a map, to (B, num_heads, N, head_dim)."""
        return x.reshape(len(x), -1, self.num_heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """The arguments for printing."""
        return f"{self.dim}, num_heads={self.num_heads}, size={self.size}"


def windows_of(x: Tensor, window: int) -> Tensor:
    """A map (B, H, W, C) in windows: (B, windows, window * window, C)."""
    parts = window_partition(x, (window, window))
    return parts.reshape(len(x), -1, window * window, x.shape[-1])


def pad_to_multiple(x: Tensor, window: int) -> Tensor:
    """Pad a map (B, H, W, C) with zeros on the right and at the bottom to multiples of `window`."""
    bottom, right = -x.shape[1] % window, -x.shape[2] % window
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def padded_tokens(height: int, width: int, window: int) -> int:
    """Tokens of a map that is padded to multiples of `window`."""
    return (height + -height % window) * (width + -width % window)
