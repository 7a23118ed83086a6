"""Deformable token merging, DTM (arXiv 2105.14217): a 2x2 merge with learned sampling positions.

It is a deformable convolution (arXiv 1703.06211) of kernel and stride 2, batch norm and GELU. The
offsets start at zero, so the initial operation is a plain convolution. The sampling is
torchvision's `deform_conv2d`, in float32 also under autocast, as in the authors' code: bfloat16
offsets are too coarse for pixels.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformConv(nn.Module):
    """2x2 stride-2 deformable convolution of (B, C, H, W). Odd sizes are rounded down.

    `conv_offset` predicts 8 channels. For kernel tap t = 2 * ky + kx, channel 2t is the vertical
    offset and channel 2t + 1 the horizontal offset, in input pixels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 2, 2))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.conv_offset = nn.Conv2d(in_channels, 8, kernel_size=2, stride=2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as a plain convolution's, and the offsets to zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            x = x.to(self.weight.dtype)
            offset = self.conv_offset(x).to(wide)
            # torchvision's kernels read outside their memory if an offset is NaN. So NaN offsets
            # are replaced by 0. The bias makes every output NaN, so that a gradient scaler detects
            # them.
            broken = 0 * offset.detach().sum()
            offset = offset.masked_fill(offset.isnan(), 0)
            bias = self.bias.to(wide) + broken
            out = deform_conv2d(x.to(wide), offset, self.weight.to(wide), bias, stride=2)
        return out.to(self.weight.dtype)


class DeformableMerging(nn.Module):
    """Merge a token map (B, H, W, dim) to (B, H // 2, W // 2, out_dim)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.dconv = DeformConv(dim, out_dim)
        self.norm_layer = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dconv(x.permute(0, 3, 1, 2))
        return F.gelu(self.norm_layer(x)).permute(0, 2, 3, 1).contiguous()

    def flops(self, height: int, width: int, *, offsets: int = 8) -> int:
        """Multiply-adds for one map. The authors count 12 offset channels instead of 8."""
        tokens = (height // 2) * (width // 2)
        convolution = 4 * self.dim * self.out_dim + self.out_dim
        return tokens * (4 * self.dim * offsets + offsets + convolution + self.out_dim)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Context manager: autocast off. No effect on devices without autocast, such as meta."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
