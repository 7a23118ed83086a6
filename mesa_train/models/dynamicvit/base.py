"""The base of all DynamicViT models: how a forward in train mode and in inference differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mesa_train.models.common.classifier import HeadedClassifier

from .outputs import Pruned, TrainingOutput


class DynamicClassifier(HeadedClassifier):
    """A classifier whose predictors choose tokens or positions.

    Attributes:
        keep_rate: share that the first predictor keeps.
        predictors: the blocks, from 0, that a predictor precedes.
        counts: tokens or positions that each predictor keeps in inference.
    """

    keep_rate: float
    predictors: tuple[int, ...]
    counts: list[int]

    def forward(self, images: Tensor, noise: Sequence[Tensor] | None = None) -> Any:
        """Classify images.

        Args:
            images: (B, in_chans, H, W).
            noise: in train mode, Gumbel noise (B, N, 2) of each predictor; default: drawn.
        Returns:
            Logits (B, num_classes); in train mode with predictors a `TrainingOutput`.
        """
        if self.training and self.predictors:
            return self.forward_train(images, noise)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised features of an inference: of the kept tokens, or of the whole map."""
        return self.prune(images).features

    def prune(self, images: Tensor) -> Pruned:
        """Choose tokens or positions as in inference."""
        raise NotImplementedError

    def forward_train(
        self, images: Tensor, noise: Sequence[Tensor] | None = None
    ) -> TrainingOutput:
        """The forward of the training. The arguments are as for `forward`."""
        raise NotImplementedError


def check_predictors(predictors: Sequence[int], depth: int) -> None:
    """Check the positions of predictors.

    Args:
        predictors: rising numbers of blocks.
        depth: number of blocks.
    Raises:
        ValueError: they are not rising, or not from 0 to `depth` - 1.
    """
    if not set(predictors) <= set(range(depth)) or list(predictors) != sorted(set(predictors)):
        raise ValueError(
            f"predictors must be rising blocks from 0 to {depth - 1}, got {predictors}"
        )
