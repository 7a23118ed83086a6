"""Semantic FPN (arXiv 1901.02446) on any backbone: class logits at a quarter of the image's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import widened
from .conventions import Conventions
from .necks import CHANNELS, pyramid_backbone
from .retinanet import run

IGNORED = 255
_WIDTH = 128


def semantic_fpn(
    backbone: str | nn.Module,
    num_classes: int = 150,
    *,
    dropout: float = 0.1,
    channels: int = CHANNELS,
    recompute_loss: bool = False,
) -> SemanticFPN:
    """Build a Semantic FPN.

    Args:
        backbone: timm name or module (see `bodies.body_of`) with maps at strides 4, 8, 16 and 32.
        num_classes: default 150.
        dropout: rate of whole channels before the classifier; default 0.1.
        channels: of the pyramid's maps; default 256.
        recompute_loss: save the logits at a quarter of the size for the backward of the loss, and
            compute the loss again there; default false.
    Returns:
        A model. `model(images)` returns logits (B, classes, H / 4, W / 4) of normalised images
        (B, 3, H, W). `model(images, labels)` returns {"loss": scalar}.
    Raises:
        ValueError: the backbone has no map of a stride.
    """
    return SemanticFPN(backbone, num_classes, dropout, channels, recompute_loss)


class Unit(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SemanticHead(nn.Module):
    """Maps at strides 4, 8, 16 and 32 to logits at stride 4.

    Each map passes units with a bilinear x2 upsampling after each, until stride 4. The map of stride
    4 passes one unit. The sum of the results is classified.
    """

    def __init__(self, num_classes: int, dropout: float, channels: int = CHANNELS) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for doublings in range(4):
            layers: list[nn.Module] = []
            for index in range(max(1, doublings)):
                layers.append(Unit(_WIDTH if index else channels, _WIDTH))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(_WIDTH, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: list[Tensor]) -> Tensor:
        heads = list(self.scale_heads)
        x = heads[0](maps[0])
        for head, level in zip(heads[1:], maps[1:], strict=True):
            # On odd maps, the upsampled map is larger than the map of stride 4.
            x = x + resized(head(level), x.shape[2:])
        return self.conv_seg(self.dropout(x))


class SemanticFPN(nn.Module):
    """See `semantic_fpn`."""

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        dropout: float,
        channels: int = CHANNELS,
        recompute_loss: bool = False,
    ) -> None:
        super().__init__()
        self.recompute_loss = recompute_loss
        self.backbone = pyramid_backbone(
            backbone, (4, 8, 16, 32), None, Conventions(), first_norm=True, channels=channels
        )
        self.decode_head = SemanticHead(num_classes, dropout, channels)
        self.num_classes = num_classes

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.decode_head(list(self.backbone(images).values()))
        if labels is None:
            return logits
        return {"loss": run(self.recompute_loss, semantic_loss, logits, labels)}

    @torch.no_grad()
    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Classes (B, H, W) of images (B, 3, H, W), or (B, *size).

        The logits are resized to the images' size, and then to `size`, the size before scaling. One
        direct resize would change up to 1 % of the pixels.
        """
        logits = resized(widened(self(images)), images.shape[2:])
        # The maximum of the logits is that of the probabilities.
        return (logits if size is None else resized(logits, size)).argmax(1)


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, classes, h, w) resized to labels (B, H, W) or (B, 1, H, W).

    Labels of 255 are ignored. The sum is divided by the number of all pixels, ignored ones included,
    as the reference does.

    Raises:
        ValueError: labels have another shape.
    """
    if labels.dim() == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 3 or len(labels) != len(logits):
        raise ValueError(
            f"labels must be ({len(logits)}, H, W) or ({len(logits)}, 1, H, W), got "
            f"{tuple(labels.shape)}"
        )
    scores = resized(widened(logits), labels.shape[1:])
    total = F.cross_entropy(scores, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def resized(x: Tensor, size: Any) -> Tensor:
    """Bilinear resize of (B, C, h, w) to `size`, without aligned corners."""
    size = tuple(size)
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")
