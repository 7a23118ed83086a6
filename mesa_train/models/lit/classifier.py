"""Base class of LITv1 and LITv2: classifiers whose stages give token maps.

A subclass defines its modules, `stages`, `pooled` and `forward_features`. The base class gives
`forward_intermediates` and `prune_intermediate_layers`, which behave as timm's.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mesa_train.models.common.classifier import HeadedClassifier
from mesa_train.models.common.classifier import default_cfg as default_cfg
from mesa_train.models.common.classifier import drop_path_rates as drop_path_rates
from mesa_train.models.common.classifier import init_linear as init_linear

# The smallest side whose map, 8 tokens at stride 4, can be halved three times.
LEAST_IMAGE_SIZE = 29


class Classifier(HeadedClassifier):
    """Image classifier of several stages.

    Attributes:
        depth: the number of stages that are left.
    """

    depth: int

    @abc.abstractmethod
    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage before merging. Each stage runs when it is requested."""

    def as_map(self, x: Tensor) -> Tensor:
        """A stage's output as a map (B, H, W, C)."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's interface: the map of each stage before merging, and the final features."""
        output_fmt = map_format(output_fmt)
        count = self.depth
        indices_taken, last = feature_take_indices(count, indices)
        maps = []
        for index, x in enumerate(self.stages(x)):  # noqa: B020
            if index in indices_taken:
                features = self.norm(x) if norm and index == count - 1 else x
                maps.append(in_format(self.as_map(features), output_fmt))
            if stop_early and index == last:
                break
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """timm's interface: remove the modules that the features of `indices` do not need."""
        take, last = feature_take_indices(self.depth, indices)
        self.drop_stages(last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @abc.abstractmethod
    def drop_stages(self, count: int) -> None:
        """Remove all stages after the first `count`."""


def check_image_size(name: str, height: int, width: int) -> None:
    """Raise ValueError for images that leave no token in the last stage."""
    if min(height, width) < LEAST_IMAGE_SIZE:
        raise ValueError(
            f"{name}: images must be at least {LEAST_IMAGE_SIZE}x{LEAST_IMAGE_SIZE}, got "
            f"{height}x{width}"
        )


def check_stages(name: str, **lists: Any) -> None:
    """Raise ValueError unless all lists of values per stage have one length."""
    lengths = [len(values) for values in lists.values()]
    if len(set(lengths)) > 1:
        *first_names, last_name = lists
        raise ValueError(
            f"{name}: {', '.join(first_names)} and {last_name} must have one length, got "
            f"{', '.join(map(str, lengths[:-1]))} and {lengths[-1]}"
        )


def map_format(name: Any) -> str:
    """timm's name of a layout, "NCHW" or "NHWC". ValueError for any other name."""
    name = getattr(name, "value", name)  # timm has an enumeration of the layouts
    if name not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {name!r}")
    return name


def in_format(x: Tensor, output_fmt: str) -> Tensor:
    """A map (B, H, W, C) in the layout `output_fmt`."""
    return x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x
