"""Detectors, segmentation and optical flow of torchvision, with their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from . import case

DETECTION = "torchvision, dense"
SIZE = 96


class Losses(nn.Module):
    """A detector with the sum of its losses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The sum of the losses."""
        return torch.stack(list(self.net(images, targets).values())).sum()


def scenes(masks: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with three boxes each."""
    boxes = torch.tensor([[8.0, 8, 40, 50], [30, 20, 80, 70], [10, 40, 60, 90]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 1])}
    if masks:
        target["masks"] = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(target["masks"], boxes.int(), strict=True):
            mask[top:bottom, left:right] = 1
    return [torch.rand(3, SIZE, SIZE) for _ in range(2)], [target, dict(target)]


def _detector(name: str, build: str, masks: bool = False, **settings: Any) -> None:
    """Add a detector's case."""

    @case(name, DETECTION)
    def make() -> tuple[nn.Module, Any]:
        factory: Callable[..., nn.Module] = getattr(torchvision.models.detection, build)
        net = factory(weights=None, weights_backbone=None, num_classes=3, **settings)
        return Losses(net), scenes(masks)


_SMALL: dict[str, Any] = {"min_size": SIZE, "max_size": SIZE}
_FEW: dict[str, Any] = {"rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32}
_detector("Faster R-CNN R50-FPN", "fasterrcnn_resnet50_fpn", **_SMALL, **_FEW)
_detector("Mask R-CNN R50-FPN", "maskrcnn_resnet50_fpn", masks=True, **_SMALL, **_FEW)
_detector("RetinaNet R50-FPN", "retinanet_resnet50_fpn", **_SMALL)
_detector("FCOS R50-FPN", "fcos_resnet50_fpn", **_SMALL)
_detector("SSDlite MobileNetV3", "ssdlite320_mobilenet_v3_large")


@case("DeepLabV3 MobileNetV3", DETECTION)
def deeplab() -> tuple[nn.Module, Any]:
    """DeepLabV3."""
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    return net, torch.randn(2, 3, SIZE, SIZE)


@case("LR-ASPP MobileNetV3", DETECTION)
def lraspp() -> tuple[nn.Module, Any]:
    """LR-ASPP."""
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    return net, torch.randn(2, 3, SIZE, SIZE)


@case("RAFT small", DETECTION)
def raft() -> tuple[nn.Module, Any]:
    """RAFT: correlation volumes, a recurrent update, instance norms."""
    net = torchvision.models.optical_flow.raft_small(weights=None)
    inputs = {
        "image1": torch.rand(1, 3, 128, 128) * 2 - 1,
        "image2": torch.rand(1, 3, 128, 128) * 2 - 1,
        "num_flow_updates": 3,
    }
    return net, inputs


@case("Video Swin-T", "video")
def swin3d() -> tuple[nn.Module, Any]:
    """Video Swin: 3-D windows."""
    net = torchvision.models.video.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=[4, 7, 7],
        num_classes=10,
    )  # fmt: skip
    return net, torch.randn(1, 3, 8, 64, 64)


@case("R(2+1)D-18", "video")
def r2plus1d() -> tuple[nn.Module, Any]:
    """R(2+1)D: factored 3-D convolutions."""
    return torchvision.models.video.r2plus1d_18(num_classes=10), torch.randn(1, 3, 4, 48, 48)
