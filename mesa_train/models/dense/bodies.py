"""Bodies of dense models: networks that turn images into maps at several strides.

Any network works that timm builds with `features_only=True`, or a Hugging Face backbone
(`AutoBackbone`), or a `PlainViT` of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.models.lit.pyramid import PyramidFeatures

from .plain_vit import PlainViT

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
    """

    def __init__(self, model: nn.Module, indices: Sequence[int], channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.indices, self.channels_last = tuple(indices), channels_last

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = _maps(self.model(images))
        chosen = [maps[index] for index in self.indices]
        return (
            [x.permute(0, 3, 1, 2).contiguous() for x in chosen] if self.channels_last else chosen
        )


def body_of(backbone: str | nn.Module, strides: Sequence[int], *, first_norm: bool = False) -> Maps:
    """The body that gives the maps at `strides`, or the one map of a plain ViT.

    Args:
        backbone: name of a timm model, or a module: of timm's `features_only=True`, of Hugging
            Face's `AutoBackbone`, or a `PlainViT`. The module itself becomes a part of the result.
            A backbone of Hugging Face whose maps have one stride is a plain ViT.
        strides: of the maps, in pixels.
        first_norm: keep the norm of LITv2's stage of stride 4; default false, as in detection.
    Raises:
        ValueError: the model has no maps, or no map of a stride.
        TypeError: backbone is neither a name nor a module.
    """
    if isinstance(backbone, str):
        import timm

        import mesa_train.models  # noqa: F401  # registers this package's models

        backbone = timm.create_model(backbone, features_only=True)
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a timm name or a module, got {backbone!r}")
    if isinstance(backbone, PlainViT):
        return Maps(backbone, backbone.channels, backbone.stride)
    all_strides, channels, channels_last = _describe(backbone)
    missing = [stride for stride in strides if stride not in all_strides]
    if missing and len(set(all_strides)) == 1 and not _is_timm(backbone):
        only = SelectedMaps(backbone, [len(all_strides) - 1], channels_last)
        return Maps(only, channels[-1:], all_strides[-1])
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} has maps at strides {all_strides}, not at {missing}"
        )
    # Of several maps of one stride, the last has seen most blocks.
    last = {stride: index for index, stride in enumerate(all_strides)}
    indices = [last[stride] for stride in strides]
    chosen = [channels[index] for index in indices]
    if isinstance(backbone, PyramidFeatures):
        return Maps(_lit_body(backbone, indices, first_norm), chosen)
    if indices == list(range(len(all_strides))) and not channels_last and _is_timm(backbone):
        return Maps(backbone, chosen)
    return Maps(SelectedMaps(backbone, indices, channels_last), chosen)


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
    if not hasattr(model, "channels"):
        raise ValueError(
            f"{type(model).__name__} gives no maps; use timm.create_model(..., features_only=True), "
            "transformers.AutoBackbone, or mesa_train.models.dense.plain_vit"
        )
    parameter = next(model.parameters())
    training = model.training
    with torch.no_grad():
        images = parameter.new_zeros(1, 3, _PROBE, _PROBE)
        maps = _maps(model.eval()(images))
    model.train(training)
    return [round(_PROBE / x.shape[-1]) for x in maps], [x.shape[1] for x in maps], False


def _maps(output: Any) -> list[Tensor]:
    return list(getattr(output, "feature_maps", output))
