"""The loss of DynamicViT: classification, share of kept tokens, and two distillations.

For a student with predictors s = 1..S and a frozen teacher without predictors,

    total = CE(student, targets) + ratio_weight / S * ratio + 0.5 * KL + 0.5 * tokens
    ratio  = sum_s mean_b (mean_n decision_s - keep_rate_s)^2
    KL     = sum over classes of p_t (log p_t - log p_s), mean over images
    tokens = the difference of the tokens that are kept at the end

The `tokens` term is the mean squared difference of features (DeiT, ConvNeXt, Swin), or the KL of
the tokens' logits (LV-ViT), averaged over the kept tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import TeacherOutput, TrainingOutput

TOKEN_LOSSES = ("mse", "kl")


class LossParts(NamedTuple):
    """The loss and its parts, before their weights. All are scalars."""

    total: Tensor
    classification: Tensor
    ratio: Tensor
    class_distillation: Tensor
    token_distillation: Tensor


def ratio_loss(decisions: Sequence[Tensor], keep_rates: Sequence[float]) -> Tensor:
    """The squared difference of the kept share of each image and its target, summed over predictors.

    Args:
        decisions: of each predictor, (B, N, 1), 1 to keep and 0 to drop.
        keep_rates: the target of each predictor.
    Raises:
        ValueError: the lists have different lengths.
    """
    if len(decisions) != len(keep_rates):
        raise ValueError(
            f"keep_rates must have one rate a predictor, got {len(keep_rates)} for {len(decisions)}"
        )
    terms = [
        (decision.flatten(1).mean(1) - rate).square().mean()
        for decision, rate in zip(decisions, keep_rates, strict=True)
    ]
    return sum(terms[1:], terms[0])


def class_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's from the teacher's logits (B, classes), mean over images."""
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


def token_distillation(student: Tensor, teacher: Tensor, mask: Tensor, loss: str) -> Tensor:
    """The difference of student's and teacher's tokens, mean over the tokens that are kept.

    It is 0 if no token of the batch is kept.

    Args:
        student, teacher: features or logits (B, N, C).
        mask: (B, N, 1), 1 for kept tokens and 0 for dropped tokens.
        loss: "mse" of features, a mean over channels; "kl" of logits, a sum over classes.
    Raises:
        ValueError: `loss` is another name.
    """
    if loss not in TOKEN_LOSSES:
        raise ValueError(f"token_loss must be one of {', '.join(TOKEN_LOSSES)}, got {loss!r}")
    if loss == "mse":
        terms = (student - teacher).square().mean(-1)
    else:
        log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        terms = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    kept = mask.squeeze(-1)
    return (terms * kept).sum() / kept.sum().clamp(min=1)


class DynamicViTLoss(nn.Module):
    """The loss of a `TrainingOutput` and a `TeacherOutput`.

    Args:
        keep_rates: the share of kept tokens of each predictor; `keep_rates` of the model.
        ratio_weight: default 2; the authors take 5 for DeiT-B and 10 for ConvNeXt and Swin.
        class_weight: of the distillation of logits; default 0.5.
        token_weight: of the distillation of tokens; default 0.5.
        token_loss: "mse" (default), or "kl" for LV-ViT.
    Raises:
        ValueError: `token_loss` is another name.
    """

    def __init__(
        self,
        keep_rates: Sequence[float],
        ratio_weight: float = 2.0,
        class_weight: float = 0.5,
        token_weight: float = 0.5,
        token_loss: str = "mse",
    ) -> None:
        super().__init__()
        if token_loss not in TOKEN_LOSSES:
            choices = ", ".join(TOKEN_LOSSES)
            raise ValueError(f"token_loss must be one of {choices}, got {token_loss!r}")
        self.keep_rates, self.ratio_weight = tuple(keep_rates), ratio_weight
        self.class_weight, self.token_weight = class_weight, token_weight
        self.token_loss = token_loss

    def forward(self, output: TrainingOutput, targets: Tensor, teacher: TeacherOutput) -> LossParts:
        """Compute the loss.

        Args:
            output: of the student in train mode.
            targets: class numbers (B,) or probabilities (B, classes).
            teacher: of the teacher for the same images, without gradient.
        """
        classification = F.cross_entropy(output.logits, targets)
        ratio = ratio_loss(output.decisions, self.keep_rates)
        classes = class_distillation(output.logits, teacher.logits)
        tokens = token_distillation(output.tokens, teacher.tokens, output.mask, self.token_loss)
        total = (
            classification
            + self.ratio_weight / len(self.keep_rates) * ratio
            + self.class_weight * classes
            + self.token_weight * tokens
        )
        return LossParts(total, classification, ratio, classes, tokens)
