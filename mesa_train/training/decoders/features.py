"""Feature maps of any timm or transformers vision model.

A plain ViT gives maps of one stride: of four blocks at equal distances, or of the last block alone.
A model of several stages gives the last map of each of its four deepest strides, mostly 4, 8, 16 and
32. Class and register tokens are dropped. The last map has the model's last norm.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.evaluation.suite.frozen import FrozenModel


class FeatureMaps(nn.Module):
    """Images (B, 3, H, W) to a list of maps (B, C, h, w), from shallow to deep.

    Args:
        net: the model.
        count: number of maps, 1 or 4.
    Raises:
        ConfigError: the model gives no maps, or fewer than `count`.

    Attributes:
        channels: of each map.
    """

    def __init__(self, net: FrozenModel, count: int) -> None:
        super().__init__()
        self.name, self.model, self.hub, self.count = net.name, net.model, net.hub, count
        self.patch = _patch(net)
        # A transformers ViT resizes its position embeddings when it is told to.
        names = inspect.signature(self.model.forward).parameters
        self.interpolates = net.hub and "interpolate_pos_encoding" in names
        try:
            with torch.no_grad():
                blank = torch.zeros(1, net.channels, net.size, net.size)
                maps = self(blank.to(next(self.model.parameters()).device))
        except ConfigError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"model.name={net.name} gives no feature maps: {reason}") from None
        self.channels = [int(m.shape[1]) for m in maps]
        self.grid = tuple(maps[-1].shape[2:])

    def forward(self, images: Tensor) -> list[Tensor]:
        return self._of_hub(images) if self.hub else self._of_timm(images)

    def _of_timm(self, images: Tensor) -> list[Tensor]:
        model: Any = self.model
        indices = self._places([int(about["reduction"]) for about in model.feature_info])
        options: dict[str, Any] = {"intermediates_only": True, "output_fmt": "NCHW"}
        maps: list[Tensor] = model.forward_intermediates(
            images, indices=indices, norm=True, **options
        )
        return maps

    def _places(self, strides: list[int]) -> list[int]:
        """Which of a model's maps are taken, from the stride of each in pixels.

        Raises:
            ConfigError: there are fewer than `count`.
        """
        depth, plain = len(strides), len(set(strides)) == 1
        deepest = [i for i, s in enumerate(strides) if s not in strides[i + 1 :]]
        found = depth if plain else len(deepest)
        if found < self.count:
            raise ConfigError(
                f"model.name={self.name} has {found} {'blocks' if plain else 'strides'}, and "
                f"model.decoder reads the maps of {self.count}; take model.decoder=linear"
            )
        if plain:
            return [depth * (i + 1) // self.count - 1 for i in range(self.count)]
        return deepest[-self.count :]

    def _of_hub(self, images: Tensor) -> list[Tensor]:
        options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        found: Any = self.model(images, output_hidden_states=True, **options)
        reshaped = getattr(found, "reshaped_hidden_states", None)
        if reshaped is not None:
            strides = [images.shape[2] // s.shape[2] for s in reshaped]
            return [reshaped[i] for i in self._places(strides)]
        h, w = (side // self.patch for side in images.shape[2:])
        # The first state is that of the embedding.
        depth = len(found.hidden_states) - 1
        states = [found.hidden_states[i + 1] for i in self._places([self.patch] * depth)]
        last = getattr(found, "last_hidden_state", None)
        states[-1] = states[-1] if last is None else last
        if states[-1].dim() == 4:
            return states
        return [
            s[:, s.shape[1] - h * w :].transpose(1, 2).reshape(len(s), -1, h, w) for s in states
        ]


def _patch(net: FrozenModel) -> int:
    """The side of a patch in pixels; 1 if the model has none."""
    if net.hub:
        size = getattr(net.model.config, "patch_size", 1) or 1
    else:
        size = getattr(getattr(net.model, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, list | tuple) else size)
