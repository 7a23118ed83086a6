"""Backbone and neck of the dense models: the maps of a body, and a feature pyramid on them.

The pyramid is torchvision's FeaturePyramidNetwork with the reference's initial weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
)

from .bodies import body_of
from .conventions import Conventions
from .frozen import keep_frozen
from .plain_vit import SimplePyramid

CHANNELS = 256


class P6P7(ExtraFPNBlock):
    """RetinaNet's levels of stride 64 and 128: P6 of the body's last map, P7 of P6.

    Args:
        in_channels: of the body's last map; None takes the pyramid's last level instead.
        channels: of P6 and P7.
        relu: a ReLU between P6 and P7; default false.
    """

    def __init__(self, in_channels: int | None, channels: int, *, relu: bool = False) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels or channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.of_body, self.relu = in_channels is not None, relu

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append the two levels."""
        p6 = self.p6((x if self.of_body else results)[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*results, p6, p7], [*names, "p6", "p7"]


class PyramidBackbone(nn.Module):
    """Images (B, 3, H, W) to named maps (B, C, H / stride, W / stride), finest first.

    Attributes:
        body: the network without its head.
        fpn: the pyramid.
        out_channels: C, 256 by default.
        strides: of the maps, in pixels.
    """

    def __init__(
        self, body: nn.Module, fpn: nn.Module, strides: Sequence[int], channels: int = CHANNELS
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = channels
        self.strides = tuple(strides)

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Set the mode. Frozen stages of the body stay in evaluation mode."""
        super().train(mode)
        keep_frozen(self.body)
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))


def pyramid_backbone(
    backbone: str | nn.Module,
    strides: Sequence[int],
    extra: str | None,
    conventions: Conventions,
    *,
    first_norm: bool = False,
    channels: int = CHANNELS,
) -> PyramidBackbone:
    """Build a body and its pyramid.

    Args:
        backbone: see `bodies.body_of`.
        strides: of the body's maps that the pyramid takes.
        extra: "p6p7", "pool" or None: the levels beyond the body's.
        conventions: of the detector.
        first_norm: LITv2's stage of stride 4 ends in a norm (segmentation) or not (detection).
        channels: of the pyramid's maps; default 256.
    """
    body = body_of(backbone, strides, first_norm=first_norm)
    widths = body.channels
    plain = body.stride is not None
    blocks: dict[str | None, Any] = {
        "p6p7": lambda: P6P7(None if plain else widths[-1], channels, relu=conventions.p7_relu),
        "pool": LastLevelMaxPool,
        None: lambda: None,
    }
    levels = [*strides]
    levels += {"p6p7": [64, 128], "pool": [64], None: []}[extra]
    block = blocks[extra]()
    fpn: nn.Module
    if body.stride is not None:
        fpn = SimplePyramid(widths[0], channels, strides, block, patch=body.stride)
    else:
        fpn = FeaturePyramidNetwork(widths, channels, block)
    if conventions.init == "reference":
        for module in fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return PyramidBackbone(body.module, fpn, levels, channels)
