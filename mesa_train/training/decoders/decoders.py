"""Decoders of feature maps: linear and UperNet for classes, linear and DPT for depth.

- linear segmentation: a 1x1 convolution of the last map (Segmenter's); the logits are resized.
- UperNet: transformers' head on four maps. Maps of one stride are resized by 4, 2, 1 and 1/2.
- linear depth: two transposed convolutions (kernel 5, stride 2) and a 1x1 convolution.
- DPT: transformers' neck and head on the maps of four blocks.

A depth decoder gives z = log(1 + metres), kept at or above 0 by a softplus. The published decoders
clip at 0, where a gradient stops.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import FeatureMaps

PYRAMID = (4.0, 2.0, 1.0, 0.5)


class DenseModel(nn.Module):
    """Backbone and decoder: images (B, 3, H, W) to (B, K, H, W).

    K is the number of classes, of logits; or 1, of log(1 + metres).

    Args:
        maps: the backbone.
        decoder: of its maps.
        frozen: run the backbone in eval mode and without a graph.
    """

    def __init__(self, maps: FeatureMaps, decoder: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.maps, self.decoder, self.frozen = maps, decoder, frozen
        maps.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> DenseModel:
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.maps.eval()
        return self

    def forward(self, images: Tensor, second: bool = False) -> Any:
        """The output; with `second`, also that of UperNet's second head (None in eval mode)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.maps(images)
        found = self.decoder(maps)
        output, further = found if isinstance(found, tuple) else (found, None)
        size = tuple(images.shape[2:])
        whole = resized(output, size)
        if not second:
            return whole
        return whole, None if further is None else resized(further, size)


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, in float32."""
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=False)


class LinearSegmentation(nn.Module):
    """A 1x1 convolution of the last map."""

    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels[-1], classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(maps[-1])
        return logits


class UperNet(nn.Module):
    """transformers' UperNet head, and its second head in training.

    Args:
        channels: of the four maps.
        classes: number of classes.
        hidden: channels of the head.
        auxiliary: have a second head.
    """

    def __init__(self, channels: list[int], classes: int, hidden: int, auxiliary: bool) -> None:
        super().__init__()
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        config = UperNetConfig(
            backbone_config={"model_type": "resnet"},
            num_labels=classes, hidden_size=hidden, auxiliary_channels=max(1, hidden // 2),
            auxiliary_in_channels=channels[2],
        )  # fmt: skip
        self.head = UperNetHead(config, channels)
        self.auxiliary = UperNetFCNHead(config, channels, in_index=2) if auxiliary else None

    def forward(self, maps: list[Tensor]) -> Any:
        levels = pyramid(maps)
        logits = self.head(levels)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, self.auxiliary(levels)


def pyramid(maps: list[Tensor]) -> list[Tensor]:
    """Four maps of falling size. Maps of different sizes stay as they are."""
    if len({tuple(m.shape[2:]) for m in maps}) > 1:
        return maps
    return [
        m
        if scale == 1
        else F.interpolate(m, _scaled(m, scale), mode="bilinear", align_corners=False)
        for m, scale in zip(maps, PYRAMID, strict=True)
    ]


def _scaled(x: Tensor, scale: float) -> tuple[int, ...]:
    """The size of a scaled map; a side has at least one token."""
    return tuple(max(1, round(side * scale)) for side in x.shape[2:])


class LinearDepth(nn.Module):
    """Two transposed convolutions and a 1x1 convolution of the last map."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        width = channels[-1]
        self.up1 = nn.ConvTranspose2d(width, width, 5, stride=2, padding=2, output_padding=1)
        self.up2 = nn.ConvTranspose2d(width, width, 5, stride=2, padding=2, output_padding=1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return F.softplus(self.out(self.up2(self.up1(maps[-1]))))


class DPT(nn.Module):
    """transformers' DPT neck and depth head on four maps of one stride.

    Args:
        channels: of the maps; they must be equal.
        hidden: channels of the fused maps.
    """

    def __init__(self, channels: list[int], hidden: int) -> None:
        super().__init__()
        from transformers import DPTConfig
        from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

        config = DPTConfig(
            hidden_size=channels[-1], neck_hidden_sizes=[hidden] * 4, fusion_hidden_size=hidden,
            reassemble_factors=[4, 2, 1, 0.5], add_projection=False, readout_type="ignore",
            is_hybrid=False,
        )  # fmt: skip
        self.neck = DPTNeck(config)
        head: Any = DPTDepthEstimationHead(config)
        # Its last layer is a ReLU, whose gradient is 0 below 0.
        self.head = nn.Sequential(*list(head.head)[:-1])

    def forward(self, maps: list[Tensor]) -> Tensor:
        h, w = maps[0].shape[2:]
        tokens = [m.flatten(2).transpose(1, 2) for m in maps]
        # The neck drops one token before the patches.
        tokens = [torch.cat([t.new_zeros(len(t), 1, t.shape[2]), t], 1) for t in tokens]
        return F.softplus(self.head(self.neck(tokens, h, w)[-1]))
