"""Images and targets of the detectors: checks, scaling to a size, normalisation, padding to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, _resize_image_and_masks
from torchvision.models.detection.transform import resize_boxes as resize_boxes

from .conventions import Conventions

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ImageTransform(GeneralizedRCNNTransform):
    """torchvision's transform with the reference's rounding of sides and threshold of masks.

    Args:
        min_size: short side after scaling, in pixels.
        max_size: largest long side after scaling, in pixels.
        conventions: of the detector.
        size_divisible: batches are padded right and below to a multiple of it.

    Attributes:
        scales_in_training: scale training images too; default true. A loader that scales the images
            itself, as for multi-scale training, sets it to false.
    """

    scales_in_training = True

    def __init__(
        self, min_size: int, max_size: int, conventions: Conventions, size_divisible: int = 32
    ) -> None:
        super().__init__(min_size, max_size, list(MEAN), list(STD), size_divisible)
        self.conventions = conventions

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale an image (C, H, W) and its target."""
        if self.training and not self.scales_in_training:
            return image, target
        if self.conventions.resized_sides == "floor":
            return super().resize(image, target)
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        if size == (height, width):
            return image, target
        # torchvision's fixed size is (width, height).
        image, target = _resize_image_and_masks(image, 0, 0, target, size[::-1])
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], [height, width], list(size))
        return image, target

    def postprocess(
        self, result: Any, image_shapes: Any, original_image_sizes: Any
    ) -> list[dict[str, Tensor]]:
        """Detections in the coordinates of the original images."""
        result = super().postprocess(result, image_shapes, original_image_sizes)
        threshold = self.conventions.mask_threshold
        if threshold is not None and not self.training:
            for detections in result:
                if "masks" in detections:
                    detections["masks"] = detections["masks"] >= threshold
        return result


def check_targets(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]] | None,
    labels: range,
    *,
    masks: bool = False,
) -> None:
    """Check the targets of a training step.

    Args:
        images: (3, H, W) each.
        targets: one mapping per image, with "boxes" (N, 4) as floats (x1, y1, x2, y2), "labels" (N,)
            as int64, and, with `masks`, "masks" (N, H, W). N may be 0.
        labels: the allowed labels.
    Raises:
        ValueError: names the image, the field and the value.
    """
    if targets is None:
        raise ValueError("the model is in training mode and needs targets; call eval() to detect")
    if len(targets) != len(images):
        raise ValueError(f"got {len(images)} images and {len(targets)} targets")
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        fields = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
        for field in fields:
            if not isinstance(target.get(field), Tensor):
                raise ValueError(f"targets[{index}] needs a tensor {field!r}")
        boxes, classes = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(
                f"targets[{index}]['boxes'] must be floats (N, 4), got {boxes.dtype} "
                f"{tuple(boxes.shape)}"
            )
        if classes.shape != boxes.shape[:1] or classes.dtype != torch.int64:
            raise ValueError(
                f"targets[{index}]['labels'] must be int64 ({len(boxes)},), got {classes.dtype} "
                f"{tuple(classes.shape)}"
            )
        wrong = [label for label in classes.tolist() if label not in labels]
        if wrong:
            raise ValueError(
                f"targets[{index}]['labels'] must be from {labels.start} to {labels.stop - 1}, got "
                f"{wrong[0]}"
            )
        # NaN coordinates compare false and are refused too.
        valid = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)
        if not valid.all():
            box = boxes[~valid][0].tolist()
            raise ValueError(
                f"targets[{index}]['boxes'] needs x1 < x2 and y1 < y2 in every box, got {box}"
            )
        if masks and target["masks"].shape != (len(boxes), *image.shape[-2:]):
            raise ValueError(
                f"targets[{index}]['masks'] must be {(len(boxes), *image.shape[-2:])}, got "
                f"{tuple(target['masks'].shape)}"
            )
