"""Losses and agreement between two predictive distributions: distillation and uncertain labels.

Function matching (arXiv 2106.05237): teacher and student see the same crop, flip and mixup; the
ground-truth labels are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """T^2 times the divergence KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        student: (N, classes) logits.
        teacher: (N, classes) logits; no gradient flows to them.
        temperature: T; default 1; above 0.
        reduction: "mean", or "none" for one value for each image; default "mean".
    Raises:
        ValueError: an argument does not fit.
    """
    s, t = _logits(student, teacher, temperature)
    log_t = F.log_softmax(t / temperature, dim=1)
    loss = (log_t.exp() * (log_t - F.log_softmax(s / temperature, dim=1))).sum(1)
    return _reduced(loss * temperature**2, reduction)


def sigmoid_distillation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """T^2 times the sum over classes of the divergence of Bernoulli distributions.

    For a teacher that was trained with one sigmoid for each class. The arguments are those of
    `distillation_loss`.
    """
    s, t = _logits(student, teacher, temperature)
    s, t = s / temperature, t / temperature
    p = t.sigmoid()
    loss = p * (F.logsigmoid(t) - F.logsigmoid(s))
    loss = loss + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return _reduced(loss.sum(1) * temperature**2, reduction)


def top_distillation_loss(
    student: Any, classes: Any, probabilities: Any, temperature: float = 1.0
) -> Tensor:
    """`distillation_loss` of a teacher of whom the best classes are known, and the rest as one.

    The divergence is between distributions over the given classes and "another class". It is at
    most that of the whole distributions, and equal if the student shares the rest like the teacher.

    Args:
        student: (N, classes) logits.
        classes: (N, k) the teacher's best classes.
        probabilities: (N, k + 1) of these classes and of the rest, at the temperature.
        temperature: default 1; above 0.
    Returns:
        The mean over images, times the square of the temperature.
    """
    s, index = torch.as_tensor(student), torch.as_tensor(classes)
    q = torch.as_tensor(probabilities).to(s)
    if q.shape != (len(s), index.shape[1] + 1) or not temperature > 0:
        raise ValueError(
            f"probabilities must have the shape {(len(s), index.shape[1] + 1)} and the temperature "
            f"must be positive, got {tuple(q.shape)} and {temperature}"
        )
    q = q / q.sum(1, keepdim=True)
    log_p = F.log_softmax(s / temperature, dim=1)
    rest = log_p.scatter(1, index, -torch.inf)
    log_p = torch.cat([log_p.gather(1, index), rest.logsumexp(1, keepdim=True)], 1)
    return (torch.xlogy(q, q) - q * log_p).sum(1).mean() * temperature**2


def teacher_agreement(student: Any, teacher: Any, k: int = 1) -> Tensor:
    """(N,) whether the teacher's top class is among the student's k top classes."""
    s, t = _logits(student, teacher, 1.0)
    return (s.topk(k, 1).indices == t.argmax(1, keepdim=True)).any(1)


def soft_nll(labels: Any, probabilities: Any) -> Tensor:
    """(N,) cross-entropy of predicted probabilities under soft labels (N, classes)."""
    q, p = _distributions(labels, probabilities)
    return -torch.xlogy(q, p).sum(1)


def label_kl(labels: Any, probabilities: Any) -> Tensor:
    """(N,) divergence KL(labels || probabilities)."""
    q, p = _distributions(labels, probabilities)
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(1)


def generalized_energy_distance(labels: Any, probabilities: Any) -> Tensor:
    """(N,) generalised energy distance of two distributions over classes.

    With the distance 1 between different classes it is 2 P(q, p differ) - P(q, q differ) -
    P(p, p differ), which is the squared Euclidean distance.
    """
    q, p = _distributions(labels, probabilities)
    return ((q - p) ** 2).sum(1)


def _logits(student: Any, teacher: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of one shape; the teacher's without gradient."""
    s, t = torch.as_tensor(student), torch.as_tensor(teacher).detach()
    if s.dim() != 2 or s.shape != t.shape:
        raise ValueError(
            f"student and teacher must have one shape (N, classes), got {tuple(s.shape)} and "
            f"{tuple(t.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return s, t


def _distributions(labels: Any, probabilities: Any) -> tuple[Tensor, Tensor]:
    """Two tensors (N, classes) of probabilities that sum to 1."""
    q, p = torch.as_tensor(labels), torch.as_tensor(probabilities)
    if q.dim() != 2 or q.shape != p.shape:
        raise ValueError(
            f"labels and probabilities must have one shape (N, classes), got {tuple(q.shape)} and "
            f"{tuple(p.shape)}"
        )
    for name, value in (("labels", q), ("probabilities", p)):
        if (value < 0).any() or not torch.allclose(value.sum(1), value.new_ones(()), atol=1e-4):
            raise ValueError(f"the rows of {name} must be probabilities that sum to 1")
    return q, p


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be one of mean, none, got {reduction!r}")
    return loss.mean() if reduction == "mean" else loss
