"""Bodies of dense models: networks that turn images into maps at several strides.

Any network works that timm builds with `features_only=True`, or a Hugging Face backbone
(`AutoBackbone`), or a `PlainViT` of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.models.lit.pyramid import PyramidFeatures

from .named import timm_body
from .plain_vit import PlainViT
from .sizes import maps_of, multiple_of, shapes

_PROBE = 256


@dataclasses.dataclass(frozen=True)
class Maps:
    """A body whose forward gives the chosen maps.

    Attributes:
        module: the body.
        channels: of each map.
        stride: of the only map of a plain ViT, from which a simple pyramid makes all levels; else
            None.
    """

    module: nn.Module
    channels: list[int]
    stride: int | None = None


class SelectedMaps(nn.Module):
    """Choose maps of a model and return them as (B, C, H, W).

    Args:
        model: returns a list of maps, or an output with `feature_maps`.
        indices: of the chosen maps.
        channels_last: the model's maps are (B, H, W, C).
        multiple: images are padded by zeros on the right and at the bottom until their sides are
            multiples of it, and the maps are cut to the images' part; default 1.
    """

    def __init__(
        self, model: nn.Module, indices: Sequence[int], channels_last: bool, multiple: int = 1
    ) -> None:
        super().__init__()
        self.model = model
        self.indices, self.channels_last = tuple(indices), channels_last
        self.multiple = multiple

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        maps = maps_of(self.model(images))
        chosen = [maps[index] for index in self.indices]
        if self.channels_last:
            chosen = [x.permute(0, 3, 1, 2).contiguous() for x in chosen]
        if not (bottom or right):
            return chosen
        strides = [images.shape[-1] // x.shape[-1] for x in chosen]
        pairs = zip(chosen, strides, strict=True)
        return [x[..., : -(-height // s), : -(-width // s)].contiguous() for x, s in pairs]


def body_of(backbone: str | nn.Module, strides: Sequence[int], *, first_norm: bool = False) -> Maps:
    """The body that gives the maps at `strides`, or the one map of a plain ViT.

    Args:
        backbone: name of a timm model (see `named.timm_body`), or a module: of timm's
            `features_only=True`, of Hugging Face's `AutoBackbone`, or a `PlainViT`. The module
            itself becomes a part of the result. A backbone whose maps have one stride is a plain
            ViT. If it takes images with sides of multiples of 32 alone, images are padded.
        strides: of the maps, in pixels.
        first_norm: keep the norm of LITv2's stage of stride 4; default false, as in detection.
    Raises:
        ValueError: the model has no maps, no map of a stride, or takes images of one size alone.
        TypeError: backbone is neither a name nor a module.
    """
    name = backbone if isinstance(backbone, str) else type(backbone).__name__
    if isinstance(backbone, str):
        backbone = timm_body(backbone)
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a timm name or a module, got {backbone!r}")
    if isinstance(backbone, PlainViT):
        return Maps(backbone, backbone.channels, backbone.stride)
    if not _is_timm(backbone) and not hasattr(backbone, "channels"):
        raise ValueError(
            f"{name} gives no maps; use timm.create_model(..., features_only=True), "
            "transformers.AutoBackbone, or mesa_train.models.dense.plain_vit"
        )
    multiple = multiple_of(backbone, name)
    all_strides, channels, channels_last = _describe(backbone)
    missing = [stride for stride in strides if stride not in all_strides]
    if missing and len(set(all_strides)) == 1:
        only = SelectedMaps(backbone, [len(all_strides) - 1], channels_last, multiple)
        return Maps(only, channels[-1:], all_strides[-1])
    if missing:
        raise ValueError(f"{name} has maps at strides {all_strides}, not at {missing}")
    # Of several maps of one stride, the last has seen most blocks.
    last = {stride: index for index, stride in enumerate(all_strides)}
    indices = [last[stride] for stride in strides]
    chosen = [channels[index] for index in indices]
    if isinstance(backbone, PyramidFeatures):
        return Maps(_lit_body(backbone, indices, first_norm), chosen)
    every = indices == list(range(len(all_strides)))
    if every and not channels_last and multiple == 1 and _is_timm(backbone):
        return Maps(backbone, chosen)
    return Maps(SelectedMaps(backbone, indices, channels_last, multiple), chosen)


def _lit_body(features: PyramidFeatures, indices: list[int], first_norm: bool) -> PyramidFeatures:
    """Drop the maps that are not chosen, and the norm of stage 0 unless `first_norm`."""
    stages = [features.out_indices[index] for index in indices]
    for stage in set(features.out_indices) - set(stages):
        delattr(features, f"norm{stage}")
    features.out_indices = stages
    if 0 in stages and not first_norm:
        features.norm0 = nn.Identity()
    return features


def _is_timm(model: nn.Module) -> bool:
    return hasattr(getattr(model, "feature_info", None), "channels")


def _describe(model: nn.Module) -> tuple[list[int], list[int], bool]:
    """Strides and channels of the maps, and true if maps are (B, H, W, C)."""
    if _is_timm(model):
        info: Any = model.feature_info
        layout = getattr(model, "output_fmt", "NCHW")
        return info.reduction(), info.channels(), getattr(layout, "value", layout) == "NHWC"
    maps = shapes(model, (_PROBE, _PROBE))
    return [round(_PROBE / shape[-1]) for shape in maps], [shape[1] for shape in maps], False
