"""Auto-labelling of unknown objects: confident background proposals become unknown (ORE)."""

from __future__ import annotations

import torch
from torch import Tensor


def auto_label_unknowns(
    labels: Tensor,
    objectness: Tensor,
    k: int = 1,
    *,
    unknown: int = 80,
    background: int = 81,
    relabel_foreground: bool = False,
) -> Tensor:
    """Label the k background proposals of highest objectness as unknown.

    Args:
        labels: of an image's sampled proposals, (N,) of int64.
        objectness: logits or probabilities of the proposal network, (N,). Of equal ones, the first
            proposal counts as higher.
        k: proposals to label, at most; default 1.
        unknown: label of unknown objects; default 80.
        background: label of the background; default 81.
        relabel_foreground: the official code's mistake: give foreground the logit -1 instead of
            leaving it out, so that foreground is labelled unknown if all background logits are
            below -1. It needs logits. Default false.
    Returns:
        New labels, (N,).
    Raises:
        ValueError: k is negative, or the shapes differ.
    Source: arXiv 2103.02603, section 4.2; github.com/JosephKJ/OWOD.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if labels.dim() != 1 or labels.shape != objectness.shape:
        raise ValueError(
            f"labels and objectness must be (N,), got {tuple(labels.shape)} and "
            f"{tuple(objectness.shape)}"
        )
    is_background = labels == background
    floor = -1.0 if relabel_foreground else float("-inf")
    scores = torch.where(is_background, objectness.detach(), floor)
    order = scores.argsort(descending=True, stable=True)[:k]
    if not relabel_foreground:
        order = order[is_background[order]]
    return labels.index_fill(0, order, unknown)
