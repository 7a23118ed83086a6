"""Transforms of pictures, boxes, masks and maps, built of torchvision's transforms v2.

A detector's picture stays uint8; the model scales it to 0..1 and normalises it. A segmenter's
picture is normalised here, because it is padded with zeros after that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mesa_train.models.dense.inputs import MEAN, STD

from .config import AugmentConfig, DataConfig
from .maps import IGNORED

_REDRAWS = 10


def detection(data: DataConfig, augment: AugmentConfig) -> v2.Transform:
    """Transforms of a detector's training sample: {"image", "boxes", "labels", "masks"}."""
    both = augment.crop > 0
    steps: list[Any] = [Scale(data.short_side, data.long_side, augment.scale, both=both)]
    if augment.crop:
        steps.append(v2.RandomCrop(augment.crop, pad_if_needed=True))
    if augment.photometric:
        steps.append(Photometric(augment.photometric))
    steps += [v2.RandomHorizontalFlip(augment.flip), v2.ClampBoundingBoxes()]
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=1), v2.ToPureTensor()])


def segmentation(data: DataConfig, augment: AugmentConfig) -> v2.Transform:
    """Transforms of a segmenter's training sample: {"image", "map"}."""
    steps = [
        Scale(data.short_side, data.long_side, augment.scale, both=True),
        MapCrop(augment.crop, augment.category_share),
        v2.RandomHorizontalFlip(augment.flip),
    ]
    if augment.photometric:
        steps.append(Photometric(augment.photometric))
    return v2.Compose([*steps, normalised(), PadTo(augment.crop), v2.ToPureTensor()])


def whole(data: DataConfig) -> v2.Transform:
    """Transforms of a segmenter's validation picture: scaled and normalised, not padded."""
    scale = Scale(data.short_side, data.long_side, (1.0, 1.0), both=True, image_only=True)
    return v2.Compose([scale, normalised(), v2.ToPureTensor()])


def normalised() -> v2.Transform:
    """Pictures from uint8 to floats, normalised by ImageNet's statistics."""
    types: dict[Any, Any] = {tv_tensors.Image: torch.float32, "others": None}
    return v2.Compose([v2.ToDtype(types, scale=True), v2.Normalize(list(MEAN), list(STD))])


def scaled_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Sides after scaling: the short side at most `short`, the long side at most `long`.

    Sides are rounded half up, as by the reference.
    """
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class Scale(v2.Transform):
    """Scale all parts of a sample, keeping the ratio of the sides.

    Args:
        short, long: largest sides in pixels.
        factors: range of a random factor.
        both: the factor also scales `long`.
        image_only: maps keep their size; default false.
    """

    def __init__(
        self,
        short: int,
        long: int,
        factors: tuple[float, float],
        *,
        both: bool,
        image_only: bool = False,
    ) -> None:
        super().__init__()
        self.short, self.long, self.factors = short, long, factors
        self.both, self.image_only = both, image_only

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size of this sample."""
        low, high = self.factors
        factor = low + (high - low) * torch.rand(()).item() if high > low else low
        long = int(self.long * factor) if self.both else self.long
        height, width = F.get_size(flat_inputs[0])
        return {"size": scaled_size(height, width, min(int(self.short * factor), long), long)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Bilinear for pictures, nearest for masks and maps."""
        if self.image_only and isinstance(inpt, tv_tensors.Mask):
            return inpt
        return F.resize(inpt, list(params["size"]), antialias=False)


class MapCrop(v2.Transform):
    """A random square crop of a picture and its map, not dominated by one class.

    Args:
        side: in pixels. Smaller pictures stay smaller.
        share: a crop in which one class has a larger share of the labelled pixels, or that has one
            class alone, is drawn again, up to 10 times. The last draw counts.
    """

    def __init__(self, side: int, share: float) -> None:
        super().__init__()
        self.side, self.share = side, share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Top, left, height and width of the crop."""
        labels = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        box: tuple[int, int, int, int] = (0, 0, 0, 0)
        for _ in range(1 + _REDRAWS if self.share < 1 else 1):
            box = self._draw(*F.get_size(labels))
            top, left, height, width = box
            part = labels[..., top : top + height, left : left + width]
            counts = part[part != IGNORED].flatten().unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.share * counts.sum():
                break
        return {"box": box}

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        sides = min(self.side, height), min(self.side, width)
        top, left = (
            int(torch.randint(whole - side + 1, ()))
            for whole, side in zip((height, width), sides, strict=True)
        )
        return top, left, *sides

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one part of the sample."""
        return F.crop(inpt, *params["box"])


class PadTo(v2.Transform):
    """Pad right and below to a square: pictures with 0, maps with 255."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        """Pad one part of the sample."""
        height, width = F.get_size(inpt)
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, self.side - width, self.side - height], fill=fill)


class Photometric(v2.Transform):
    """Random changes of brightness, contrast, saturation and hue, each with one probability.

    Brightness shifts by up to 32 of 255, contrast and saturation scale by 0.5 to 1.5, hue turns by
    up to a tenth of the circle. Contrast comes before or after the colours. The ranges are those of
    mmseg; saturation and hue are torchvision's functions.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:  # noqa: ARG002
        """The strengths; None for a change that is left out."""
        ranges = {
            "brightness": (-32.0, 32.0),
            "contrast": (0.5, 1.5),
            "saturation": (0.5, 1.5),
            "hue": (-0.1, 0.1),
        }
        drawn = torch.rand(2 * len(ranges) + 1).tolist()
        found: dict[str, Any] = {"first": drawn[-1] < 0.5}
        for index, (name, (low, high)) in enumerate(ranges.items()):
            value = low + (high - low) * drawn[2 * index]
            found[name] = value if drawn[2 * index + 1] < self.probability else None
        return found

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change a picture; masks, maps and boxes stay."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image: Any = inpt
        if params["brightness"] is not None:
            image = _bytes(image.float() + params["brightness"])
        if params["contrast"] is not None and params["first"]:
            image = _bytes(image.float() * params["contrast"])
        if params["saturation"] is not None:
            image = F.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = F.adjust_hue(image, params["hue"])
        if params["contrast"] is not None and not params["first"]:
            image = _bytes(image.float() * params["contrast"])
        return tv_tensors.wrap(image, like=inpt)


def _bytes(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)
