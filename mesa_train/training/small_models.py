"""Models for small images: a small ViT, or any timm model.

The seed alone determines the weights: two builds with one seed give the same model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.training.data.packaged import ImageSet

# A ViT for images of 28x28: 16 tokens of width 128, 6 blocks, 1.2 million parameters.
SMALL_VIT = "small_vit"
_WIDTH, _DEPTH, _HEADS = 128, 6, 4

# The largest default image size of other models. Patches of 16 need about this many pixels.
DEFAULT_IMAGE_SIZE = 64


def build(
    name: str, data: ImageSet, *, seed: int, image_size: int | None = None
) -> tuple[nn.Module, ImageSet]:
    """Build a classifier and resize the images to its input size.

    Args:
        name: "small_vit" or a timm model.
        data: the images and labels.
        seed: of the weights.
        image_size: in pixels. Default for "small_vit": the size of the data. Default for timm
            models: 64, or the model's own input size if that is smaller.
    Returns:
        (model, resized data).
    Raises:
        ValueError: the name is unknown, or the model cannot take the image size.
    """
    import timm

    import mesa_train.models as registered  # noqa: F401  timm knows them from here on

    if name != SMALL_VIT and not timm.is_model(name):
        near = difflib.get_close_matches(name, [SMALL_VIT, *timm.list_models()], n=4)
        hint = f"; close names: {', '.join(near)}" if near else ""
        raise ValueError(f"no model {name!r}{hint}")
    size = image_size or _default_size(name, data)
    classifier = {"in_chans": data.channels, "num_classes": data.num_classes}
    torch.manual_seed(seed)
    try:
        if name == SMALL_VIT:
            model = _small_vit(size, classifier)
        else:
            model = _of_timm(name, size, classifier)
        resized = dataclasses.replace(
            data, train=data.train.resized(size), held_out=data.held_out.resized(size)
        )
        with torch.no_grad():
            model.eval()(resized.normalise(resized.held_out.images[:1].float() / 255))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} cannot take images of {size}x{size}: {reason}") from error
    return model, resized


def _default_size(name: str, data: ImageSet) -> int:
    """The default image size of a model in pixels."""
    if name == SMALL_VIT:
        return data.image_size
    from timm.models import get_pretrained_cfg

    meant_for = get_pretrained_cfg(name)
    return min(meant_for.input_size[-1], DEFAULT_IMAGE_SIZE) if meant_for else DEFAULT_IMAGE_SIZE


class ConvStem(nn.Module):
    """Patch embedding by convolutions of stride 2 instead of one of stride 8 (arXiv 2106.14881).

    With a few thousand images, a ViT learns several times faster with this stem. It replaces timm's
    PatchEmbed: images (N, in_chans, H, W) become tokens (N, H/8 * W/8, embed_dim), rounded up.
    """

    def __init__(self, img_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_chans
        for out in (embed_dim // 8, embed_dim // 4, embed_dim // 2):
            layers += [
                nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.GELU(),
            ]
            channels = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, kernel_size=1))
        side = math.ceil(img_size / 8)
        self.grid_size = (side, side)
        self.num_patches = side * side

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def _small_vit(image_size: int, classifier: dict[str, int]) -> nn.Module:
    """The small ViT."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        embed_layer=ConvStem,
        embed_dim=_WIDTH,
        depth=_DEPTH,
        num_heads=_HEADS,
        class_token=False,
        global_pool="avg",
        **classifier,
    )


def _of_timm(name: str, image_size: int, classifier: dict[str, int]) -> nn.Module:
    """Create timm's model, with the image size if its constructor takes one."""
    import timm

    try:
        return timm.create_model(name, img_size=image_size, **classifier)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **classifier)
