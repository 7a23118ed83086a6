"""Base class of the image classifiers: timm's interface, written once for all models here.

A subclass defines its modules, `stages`, `pooled` and `forward_features`. The base class gives
`forward_head`, `forward_intermediates`, `get_classifier` and `reset_classifier`, which behave as
timm's.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

# The smallest side whose map, 8 tokens at stride 4, can be halved three times.
LEAST_IMAGE_SIZE = 29


class Classifier(nn.Module, abc.ABC):
    """Image classifier: images (B, C, H, W) to logits (B, num_classes), or to features.

    A model without classes (`num_classes=0`) returns features.

    Attributes:
        pools: the choices of `global_pool`.
        depth: the number of stages that are left.
    """

    pools: tuple[str, ...] = ("avg", "")
    num_features: int
    norm: nn.Module
    head: nn.Module
    depth: int

    def set_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        """Add the head, the last module of a subclass. Its weights are not drawn yet."""
        self.head_hidden_size, self.drop_rate = self.num_features, drop_rate
        self.num_classes, self.global_pool = num_classes, self._pool(global_pool)
        self.head = self._classifier()

    @abc.abstractmethod
    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage before merging. Each stage runs when it is requested."""

    @abc.abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """Pool features to (B, num_features), by `global_pool`."""

    def as_map(self, x: Tensor) -> Tensor:
        """A stage's output as a map (B, H, W, C)."""
        return x

    @abc.abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Features of images, before pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features, apply dropout and the head. With `pre_logits`, skip the head."""
        if self.global_pool:
            x = self.pooled(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

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

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes`, or by none for 0.

        Args:
            num_classes: 0 for no head.
            global_pool: one of `pools`; default: unchanged.
        """
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self._classifier().to(like.device, like.dtype)
        init_linear(self.head)

    def _classifier(self) -> nn.Module:
        """A head of `num_classes`; the identity for 0."""
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def _pool(self, name: str) -> str:
        """Check a name of `global_pool`. ValueError if it is none of `pools`."""
        if name not in self.pools:
            choices = ", ".join(map(repr, self.pools[:-1])) + f" or {self.pools[-1]!r}"
            raise ValueError(f"global_pool must be {choices}, got {name!r}")
        return name


def default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of a model's input images."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **changes,
    }


def drop_path_rates(last: float, depth: int) -> list[float]:
    """One rate for each block, from 0 to `last`. ValueError unless 0 <= last < 1."""
    if not 0 <= last < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {last}")
    return [last * block / max(depth - 1, 1) for block in range(depth)]


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


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear: truncated normal weights, biases of zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
