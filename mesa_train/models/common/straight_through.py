"""Straight-through estimators: a hard value in the forward, a soft value's gradient in the backward.

`straight_through` and `relaxed_bernoulli` consist of torch functions alone. The sum that gives the
gradient is exact: a finite value minus itself is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, with the gradient of `soft`. Both have one shape."""
    return hard + (soft - soft.detach())


def gumbel_noise(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise of the shape, dtype and device of `like`."""
    return -torch.empty_like(like).exponential_().log()


def gumbel_softmax(log_probabilities: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draw one choice of the last dim: one-hot, with the gradient of the softmax (temperature 1).

    Args:
        log_probabilities: (..., choices), up to a constant.
        noise: Gumbel noise of the same shape; default: drawn.
    """
    if noise is None:
        noise = gumbel_noise(log_probabilities)
    soft = (log_probabilities + noise).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return straight_through(hard, soft)


def relaxed_bernoulli(probabilities: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draw 0 or 1, with the gradient of the relaxed Bernoulli distribution (temperature 1).

    Args:
        probabilities: of a 1; clamped to [eps, 1 - eps] of float32.
        uniform: draws from [0, 1) of the same shape; default: drawn.
    """
    if uniform is None:
        uniform = torch.rand_like(probabilities)
    eps = torch.finfo(torch.float32).eps
    p, u = probabilities.clamp(eps, 1 - eps), uniform.clamp(eps, 1 - eps)
    logits = u.log() - (-u).log1p() + p.log() - (-p).log1p()
    return straight_through((logits > 0).to(logits.dtype), logits.sigmoid())
