"""Dual towers of open_clip with their contrastive losses."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from . import case

TOWERS = "dual towers"
TEXT = {"context_length": 32, "vocab_size": 1000, "width": 96, "heads": 3, "layers": 3}


class Contrasted(nn.Module):
    """Two towers with the loss of their embeddings."""

    def __init__(self, net: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = net, criterion

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """The loss."""
        return self.criterion(*self.net(images, texts))


def pairs(size: int = 112) -> tuple[Tensor, Tensor]:
    """Images and tokens."""
    return torch.randn(8, 3, size, size), torch.randint(0, 999, (8, 32))


def _towers(vision: dict[str, Any], **settings: Any) -> nn.Module:
    """open_clip's model."""
    return open_clip.model.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=TEXT, **settings)


@case("open_clip ViT contrastive", TOWERS)
def vit() -> tuple[nn.Module, Any]:
    """A ViT and a text transformer with CLIP's loss."""
    vision = {"image_size": 112, "patch_size": 14, "width": 96, "head_width": 32, "layers": 3}
    return Contrasted(_towers(vision), ClipLoss()), pairs()


@case("open_clip ResNet contrastive", TOWERS)
def resnet() -> tuple[nn.Module, Any]:
    """CLIP's ResNet with attention pooling."""
    vision = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
    return Contrasted(_towers(vision), ClipLoss()), pairs(96)


@case("open_clip with timm ViT sigmoid loss", TOWERS)
def timm_tower() -> tuple[nn.Module, Any]:
    """A tower of timm with SigLIP's loss."""
    vision = {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    net = open_clip.model.CLIP(
        embed_dim=192, vision_cfg=vision, text_cfg=TEXT, init_logit_bias=-10.0
    )
    images, texts = pairs(224)
    return Contrasted(net, SigLipLoss()), (images[:4], texts[:4])


class Features(nn.Module):
    """Projections of the frozen features of many pairs: the scores of all pairs outweigh the rest."""

    def __init__(self, criterion: nn.Module, bias: float | None = None) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(192, 256), nn.Linear(192, 256)
        self.scale = nn.Parameter(torch.tensor(2.66))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.criterion = criterion

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """The loss."""
        images = F.normalize(self.image(images), dim=-1)
        texts = F.normalize(self.text(texts), dim=-1)
        rest = () if self.bias is None else (self.bias,)
        return self.criterion(images, texts, self.scale.exp(), *rest)


def features(count: int = 1024) -> tuple[Tensor, Tensor]:
    """Features of `count` pairs."""
    return torch.randn(count, 192), torch.randn(count, 192)


@case("CLIP loss of 1,024 pairs", TOWERS)
def clip_loss() -> tuple[nn.Module, Any]:
    """Projections with CLIP's loss."""
    return Features(ClipLoss()), features()


@case("SigLIP loss of 1,024 pairs", TOWERS)
def siglip_loss() -> tuple[nn.Module, Any]:
    """Projections with SigLIP's loss."""
    return Features(SigLipLoss(), bias=-10.0), features()
