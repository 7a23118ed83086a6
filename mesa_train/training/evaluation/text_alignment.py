"""Contrastive image-text losses, prompt ensembles and the clean-up of texts (LiT, arXiv 2111.07991).

All losses take embeddings of length 1 and a global batch.
"""

from __future__ import annotations

import re
import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    images: Any, texts: Any, temperature: float | Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Half the cross-entropy of images against texts plus half that of texts against images.

    Args:
        images: (N, width), rows of length 1.
        texts: (N, width), rows of length 1; text i belongs to image i.
        temperature: factor of the cosines. LiT learns its logarithm, from log(10).
        reduction: "mean", or "none" for one value for each pair; default "mean".
    Raises:
        ValueError: the shapes differ, or the reduction is unknown.
    """
    x, y = _pair(images, texts)
    logits = x @ y.T * temperature
    target = torch.arange(len(x), device=x.device)
    loss = (
        F.cross_entropy(logits, target, reduction="none")
        + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    return _reduced(loss, reduction)


def sigmoid_contrastive_loss(
    images: Any,
    texts: Any,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid of each pair's logit, summed over texts, without a softmax over the batch.

    Args:
        images: (N, width), rows of length 1.
        texts: (N, width), rows of length 1.
        temperature: factor of the cosines.
        bias: added to the logits; default 0.
        reduction: "mean" over images, or "none"; default "mean".
    """
    x, y = _pair(images, texts)
    logits = x @ y.T * temperature + bias
    sign = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return _reduced(-F.logsigmoid(sign * logits).sum(1), reduction)


def image_to_text_hits(images: Any, texts: Any) -> Tensor:
    """(N,) whether the nearest text of an image is its own."""
    x, y = _pair(images, texts)
    return (x @ y.T).argmax(1) == torch.arange(len(x), device=x.device)


def prompt_average(embeddings: Any, labels: Any) -> Tensor:
    """Class embeddings (classes, width): the normalised mean of each class's normalised prompts.

    Args:
        embeddings: (prompts, width), rows of length 1.
        labels: (prompts,) classes from 0, each with a prompt.
    Raises:
        ValueError: a class has no prompt.
    """
    x, y = torch.as_tensor(embeddings), torch.as_tensor(labels).long()
    counts = torch.bincount(y)
    if x.dim() != 2 or len(x) != len(y) or not counts.all():
        raise ValueError(
            f"embeddings {tuple(x.shape)} and labels {tuple(y.shape)} must give each class a prompt"
        )
    sums = x.new_zeros(len(counts), x.shape[1]).index_add(0, y.to(x.device), x)
    means = sums / counts[:, None]
    return means / (means.norm(dim=1, keepdim=True) + 1e-8)


def canonicalize(text: str, keep: str = "") -> str:
    """Clean a text: lower case, no punctuation, single spaces. "_" becomes a space.

    Models that were trained on raw text, such as CLIP, must not get cleaned text.

    Args:
        text: a prompt or a class name.
        keep: a punctuation text to keep: "{}" in templates, "," in lists of names.
    """
    drop = str.maketrans("", "", string.punctuation)
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    cleaned = keep.join(part.translate(drop) for part in parts)
    return re.sub(r"\s+", " ", cleaned.lower()).strip()


def _pair(images: Any, texts: Any) -> tuple[Tensor, Tensor]:
    """Two tensors of the same shape (N, width)."""
    x, y = torch.as_tensor(images), torch.as_tensor(texts)
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(
            f"images and texts must have one shape (N, width), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return x, y


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be one of mean, none, got {reduction!r}")
    return loss.mean() if reduction == "mean" else loss
