"""Faster R-CNN and Mask R-CNN on any backbone, with the reference's rules by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from .conventions import Conventions, conventions_of
from .inputs import ImageTransform, check_targets
from .necks import CHANNELS, PyramidBackbone, pyramid_backbone
from .roi_heads import RegionHeads
from .rpn import STRIDES, ProposalNetwork


def faster_rcnn(
    backbone: str | nn.Module,
    num_classes: int = 80,
    *,
    conventions: Conventions | str = "reference",
    min_size: int = 800,
    max_size: int = 1333,
    channels: int = CHANNELS,
) -> RCNN:
    """Build a Faster R-CNN.

    Args:
        backbone: timm name or module (see `bodies.body_of`) with maps at strides 4, 8, 16 and 32.
        num_classes: without background. Labels are 0 to num_classes - 1, or with
            `background="first"` 1 to num_classes. Default 80.
        conventions: "reference" (default), "torchvision" or `Conventions`.
        min_size: short side of the scaled image, in pixels; default 800.
        max_size: largest long side, in pixels; default 1333.
        channels: of the pyramid's maps; default 256.
    Returns:
        A model. In training, `model(images, targets)` returns a dictionary of losses; in evaluation,
        `model(images)` returns "boxes", "scores" and "labels" of each image. Images are (3, H, W)
        each, from 0 to 1.
    Raises:
        ValueError: the backbone has no map of a stride, or the conventions are unknown.
    """
    return _rcnn(backbone, num_classes, conventions, min_size, max_size, channels, masks=False)


def mask_rcnn(
    backbone: str | nn.Module,
    num_classes: int = 80,
    *,
    conventions: Conventions | str = "reference",
    min_size: int = 800,
    max_size: int = 1333,
    channels: int = CHANNELS,
) -> RCNN:
    """Build a Mask R-CNN.

    Args and errors are those of `faster_rcnn`. Targets also have "masks" (N, H, W); detections have
    "masks" (N, 1, H, W), boolean by default.
    """
    return _rcnn(backbone, num_classes, conventions, min_size, max_size, channels, masks=True)


def _rcnn(
    backbone: str | nn.Module,
    num_classes: int,
    conventions: Conventions | str,
    min_size: int,
    max_size: int,
    channels: int,
    *,
    masks: bool,
) -> RCNN:
    rules = conventions_of(conventions)
    neck = pyramid_backbone(backbone, STRIDES[:4], "pool", rules, channels=channels)
    return RCNN(neck, num_classes, rules, ImageTransform(min_size, max_size, rules), masks=masks)


class RCNN(GeneralizedRCNN):
    """See `faster_rcnn` and `mask_rcnn`."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        rules: Conventions,
        transform: ImageTransform,
        *,
        masks: bool,
    ) -> None:
        channels = backbone.out_channels
        heads = RegionHeads(channels, num_classes, rules, masks)
        super().__init__(backbone, ProposalNetwork(channels, rules), heads, transform)
        self.num_classes, self.conventions = num_classes, rules

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training, detections in evaluation."""
        if self.training:
            heads: Any = self.roi_heads
            check_targets(images, targets, heads.labels, masks=heads.has_mask())
        return super().forward(images, targets)
