"""DynamicViT's predictor: log-probabilities of keeping and dropping each token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of the output. The paper's text has them the other way round.
KEEP, DROP = 0, 1


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of tokens (..., in_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Predictor(nn.Module):
    """Score tokens (B, N, dim): log-probabilities (B, N, 2), of keeping first.

    Half of the hidden channels are replaced by their mean over the tokens.

    Args:
        dim: width; a multiple of 4.
        eps: of the norm; default 1e-5, also where a backbone has 1e-6, as in the authors' code.
        pointwise: weights (out, in, 1, 1) as of 1x1 convolutions, not (out, in); default false.
    """

    def __init__(self, dim: int, eps: float = 1e-5, pointwise: bool = False) -> None:
        super().__init__()
        self.dim = dim
        linear: Any = PointwiseConv if pointwise else nn.Linear
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps), linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            linear(dim, dim // 2),
            nn.GELU(),
            linear(dim // 2, dim // 4),
            nn.GELU(),
            linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Score the tokens.

        Args:
            x: (B, N, dim).
            policy: (B, N, 1), 1 for the tokens that the mean counts and 0 for the others; default:
                all tokens count.
        """
        local, rest = self.in_conv(x).chunk(2, dim=-1)
        if policy is None:
            mean = rest.mean(1, keepdim=True)
        else:
            # The authors divide by the number of kept tokens. An image without one then gives 0/0,
            # and the loss becomes NaN. A divisor of at least 1 changes no other image.
            kept = policy.sum(1, keepdim=True).clamp(min=1)
            mean = (rest * policy).sum(1, keepdim=True) / kept
        return self.out_conv(torch.cat([local, mean.expand_as(rest)], dim=-1))


def keep_counts(tokens: int, keep_rate: float, predictors: int) -> list[int]:
    """Tokens that each predictor keeps: `tokens` times keep_rate, its square, and so on.

    Raises:
        ValueError: `keep_rate` is not in (0, 1], or a count is 0.
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must be above 0 and at most 1, got {keep_rate}")
    counts = [int(tokens * keep_rate ** (stage + 1)) for stage in range(predictors)]
    if 0 in counts:
        raise ValueError(f"keep_rate={keep_rate} keeps no token of {tokens} at the last predictor")
    return counts


def flops(tokens: int, dim: int) -> int:
    """Multiply-adds of a predictor for one image."""
    return tokens * (dim * dim + dim * dim // 2 + dim * dim // 8 + dim // 2)
