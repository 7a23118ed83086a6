"""Gated convolutions that take attention's place: VAN's and HorNet's. They have no heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AttentionLayer


class LargeKernelAttention(AttentionLayer):
    """VAN's layer (arXiv 2202.09741): x + W2 lka(GELU(W1 x)), with lka(u) = u * convolutions(u).

    The convolutions are depthwise 5x5, depthwise 7x7 with dilation 3, and 1x1. The layer contains
    its residual.
    """

    def __init__(self, dim: int, num_heads: int, height: int, width: int) -> None:
        super().__init__(dim, num_heads, height, width)
        self.proj_in, self.pointwise, self.proj_out = (nn.Linear(dim, dim) for _ in range(3))
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)

    def mix(self, x: Tensor) -> Tensor:
        u = F.gelu(self.proj_in(x))
        gate = self.far(self.near(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return x + self.proj_out(u * self.pointwise(gate))

    def flops(self, height: int, width: int) -> int:
        return height * width * (3 * self.dim**2 + (25 + 49) * self.dim)


class GatedConvolution(AttentionLayer):
    """HorNet's recursive gated convolution gnConv (arXiv 2207.14284).

    A projection gives p of dim / 2^(order - 1) channels and a map that a 7x7 depthwise convolution
    filters. The map's parts double in width. p is multiplied by a part and projected to the next
    part's width, `order` times.

    Args:
        order: default 4; 2^(order - 1) must divide `dim`.
        scale: factor of the filtered map; default 1/3.
    Raises:
        ValueError: also if 2^(order - 1) does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        height: int,
        width: int,
        *,
        order: int = 4,
        scale: float = 1 / 3,
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("order", order, 1)
        self.check_multiple("dim", dim, "2^(order - 1)", 2 ** (order - 1))
        self.scale = scale
        self.widths = [dim // 2**power for power in reversed(range(order))]
        filtered = sum(self.widths)
        self.proj_in = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv2d(filtered, filtered, 7, padding=3, groups=filtered)
        self.pointwise = nn.ModuleList(nn.Linear(width, 2 * width) for width in self.widths[:-1])
        self.proj_out = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        p, rest = self.proj_in(x).split((self.widths[0], sum(self.widths)), dim=-1)
        rest = self.depthwise(rest.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * self.scale
        first, *parts = torch.split(rest, self.widths, dim=-1)
        p = p * first
        for project, part in zip(self.pointwise, parts, strict=True):
            p = project(p) * part
        return self.proj_out(p)

    def flops(self, height: int, width: int) -> int:
        pointwise = sum(2 * width * width for width in self.widths[:-1])
        return height * width * (3 * self.dim**2 + 49 * sum(self.widths) + pointwise)
