"""What DynamicViT models return: in training for the loss, and in inference for inspection."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainingOutput(NamedTuple):
    """The output of a model with predictors in train mode.

    Attributes:
        logits: (B, classes), of the class token (ViTs) or the pooled map.
        tokens: the features or logits of every position, for the distillation.
        mask: (B, positions, 1) without gradient, 1 for the positions that the distillation of tokens
            counts: those that a ViT keeps at the end, and all positions of a map.
        decisions: of each predictor, (B, N, 1), 1 to keep and 0 to drop. ViTs decide cumulatively.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    decisions: tuple[Tensor, ...]


class TeacherOutput(NamedTuple):
    """The output of a model without predictors, as a teacher.

    Attributes:
        logits: (B, classes), as in `TrainingOutput`.
        tokens: as in `TrainingOutput`.
    """

    logits: Tensor
    tokens: Tensor


class Pruned(NamedTuple):
    """The tokens that are left, and how each predictor chose them.

    Attributes:
        features: normalised features after the last block.
        scores: of each predictor, the log-probability of keeping: (B, tokens it saw).
        kept: of each predictor, the kept positions in the image: (B, count), ascending.
    """

    features: Tensor
    scores: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
