"""The two augmentation pipelines of MoCo v3, which are those of BYOL (arXiv 2006.07733).

| step | first view | second view |
|---|---|---|
| random resized crop, bilinear, share of the area from `crop_min` to 1 | yes | yes |
| colour jitter 0.4, 0.4, 0.2, 0.1 | 0.8 | 0.8 |
| grey | 0.2 | 0.2 |
| Gaussian blur, Pillow's radius from 0.1 to 2 | always | 0.1 |
| solarise from 128 | never | 0.2 |
| horizontal flip | 0.5 | 0.5 |
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mesa_train.training.data.config import DataConfig

from .config import ViewsConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Blur:
    """Pillow's Gaussian blur with a random radius.

    Args:
        probability: of a blur.
        largest: radius in pixels; the smallest is 0.1.
    """

    def __init__(self, probability: float, largest: float = 2.0) -> None:
        self.probability, self.largest = probability, max(largest, 0.1)

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.probability:
            return image
        radius = torch.empty(()).uniform_(0.1, self.largest).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


class TwoViews:
    """Two views of an image: (2, 3, size, size), the first from the first pipeline."""

    def __init__(self, first: Any, second: Any) -> None:
        self.pipelines = (first, second)

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([pipeline(image) for pipeline in self.pipelines])


def pipeline(size: int, config: ViewsConfig, *, blur: float, solarise: float) -> Any:
    """One pipeline, from a PIL image in RGB to normalised pixels (3, size, size).

    Args:
        size: in pixels.
        config: the section `views`.
        blur: probability of the blur.
        solarise: probability of solarisation.
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=(config.crop_min, 1.0), interpolation=v2.InterpolationMode.BILINEAR
            ),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            Blur(blur, config.blur),
            v2.RandomSolarize(threshold=128, p=solarise),
            v2.RandomHorizontalFlip(config.hflip),
            *_to_pixels(),
        ]
    )


def transforms(data: DataConfig, config: ViewsConfig) -> tuple[Any, Any]:
    """Transforms of PIL images: (two views, one image for nearest neighbours)."""
    from torchvision.transforms import v2

    size = data.image_size
    views = TwoViews(
        pipeline(size, config, blur=1.0, solarise=0.0),
        pipeline(size, config, blur=0.1, solarise=0.2),
    )
    resized = round(size * 256 / 224) if data.crop else size
    plain = v2.Compose(
        [
            v2.Resize(
                resized if data.crop else [size, size],
                interpolation=v2.InterpolationMode.BILINEAR,
                antialias=True,
            ),
            v2.CenterCrop(size),
            *_to_pixels(),
        ]
    )
    return views, plain


def _to_pixels() -> list[Any]:
    """From a PIL image to normalised pixels."""
    from torchvision.transforms import v2

    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
