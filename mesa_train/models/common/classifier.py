"""Base class of the image classifiers: timm's interface to the head, written once for all models.

A subclass defines its modules, `pooled` and `forward_features`. The base class gives
`forward_head`, `get_classifier` and `reset_classifier`, which behave as timm's.
"""

from __future__ import annotations

import abc
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from torch import Tensor, nn


class HeadedClassifier(nn.Module, abc.ABC):
    """Image classifier: images (B, C, H, W) to logits (B, num_classes), or to features.

    A model without classes (`num_classes=0`) returns features.

    Attributes:
        pools: the choices of `global_pool`.
    """

    pools: tuple[str, ...] = ("avg", "")
    num_features: int
    norm: nn.Module
    head: nn.Module

    def set_head(self, num_classes: int, global_pool: str, drop_rate: float = 0.0) -> None:
        """Add the head, the last module of a subclass. Its weights are not drawn yet."""
        self.head_hidden_size, self.drop_rate = self.num_features, drop_rate
        self.num_classes, self.global_pool = num_classes, self._pool(global_pool)
        self.head = self._classifier()

    @abc.abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """Pool features to (B, num_features), by `global_pool`."""

    @abc.abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Features of images, before pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features, apply dropout and the head. With `pre_logits`, skip the head."""
        if self.global_pool:
            x = self.pooled(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Any:
        return self.forward_head(self.forward_features(images))

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
        self.head = self._new_classifier()

    def _new_classifier(self) -> nn.Module:
        """An initialised head of `num_classes`, of the model's dtype and on its device."""
        like = next(self.parameters())
        head = self._classifier().to(like.device, like.dtype)
        init_linear(head)
        return head

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


def check_fixed_size(name: str, images: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless images (B, C, H, W) have the (height, width) of the model."""
    if tuple(images.shape[2:]) != tuple(size):
        raise ValueError(
            f"this {name} takes images of {size[0]}x{size[1]}, got "
            f"{images.shape[2]}x{images.shape[3]}; set img_size when the model is built"
        )


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear: truncated normal weights, biases of zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
