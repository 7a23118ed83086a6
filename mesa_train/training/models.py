"""Models for small images: a ViT sized for them, or any timm model.

Weights are drawn from the seed alone, so two builds with one seed are the same model.
"""

from __future__ import annotations

import dataclasses
import difflib

import torch
from torch import nn

from .data import ImageSet

# A ViT for 28x28 images: 49 tokens, 0.7 million parameters.
SMALL_VIT = "small_vit"
_SMALL_VIT_WIDTHS = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}

# What other models are given, if not told otherwise: the least that patches of 16 make sense for.
DEFAULT_IMAGE_SIZE = 64


def build(
    name: str, data: ImageSet, *, seed: int, image_size: int | None = None
) -> tuple[nn.Module, ImageSet]:
    """A classifier of `data` named "small_vit" or as in timm, and the images resized to suit it.

    `image_size` in pixels defaults to the data's own for the small ViT and to 64 for timm models.
    Raises ValueError for an unknown name or a size that the model refuses.
    """
    import timm

    size = image_size or (data.image_size if name == SMALL_VIT else DEFAULT_IMAGE_SIZE)
    if name != SMALL_VIT and not timm.is_model(name):
        near = difflib.get_close_matches(name, [SMALL_VIT, *timm.list_models()], n=4)
        hint = f"; close names: {', '.join(near)}" if near else ""
        raise ValueError(f"no model {name!r}{hint}")
    classifier = {"in_chans": data.channels, "num_classes": data.num_classes}
    torch.manual_seed(seed)
    try:
        if name == SMALL_VIT:
            model = timm.models.VisionTransformer(
                img_size=size, **_SMALL_VIT_WIDTHS, **classifier
            )
        else:
            model = _of_timm(name, size, classifier)
        resized = dataclasses.replace(data, train=data.train.resized(size), held_out=data.held_out.resized(size))
        with torch.no_grad():
            model.eval()(resized.normalise(resized.held_out.images[:1].float() / 255))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} refuses images of {size}x{size}: {reason}") from error
    return model, resized


def _of_timm(name: str, image_size: int, classifier: dict[str, int]) -> nn.Module:
    """timm's model, told the image size if its constructor takes one."""
    import timm

    try:
        return timm.create_model(name, img_size=image_size, **classifier)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **classifier)
