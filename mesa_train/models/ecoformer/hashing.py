"""EcoFormer's kernelised hash: unit vectors to codes of -1 and 1, with a clipped gradient.

For unit vectors x, m anchors a, their mean kernel values mu and weights A,

    D_nj = |x_n - a_j|^2      sigma = mean of D over n and j      K = exp(-D / (2 sigma))
    y = (K - mu) A^T          code = sign(y)

`sigma` is of the given image and head, so a token's code depends on all tokens of its image. The
gradient goes through D and through sigma. Where -1 < y < 1, the gradient of y is the code's;
elsewhere it is 0.

The distances come from one matmul. The authors' code forms a tensor (B, heads, N, m, head_dim).
`ecoformer/fit.py` fits A, mu and the anchors, which are buffers. Before the fit the hash is random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.utils.clipped_sign import clipped_sign


class KernelHash(nn.Module):
    """Hash unit vectors (B, num_heads, N, head_dim) to codes (B, num_heads, N, bits).

    Args:
        num_heads: heads; each has its own hash.
        head_dim: width of a vector.
        bits: of a code; default 16.
        anchors: m; default 25.
    Attributes:
        A: (num_heads, bits, anchors), weights.
        mvec: (1, num_heads, 1, anchors), mean kernel values.
        anchor: (1, num_heads, anchors, head_dim).
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor

    def __init__(self, num_heads: int, head_dim: int, bits: int = 16, anchors: int = 25) -> None:
        super().__init__()
        self.bits, self.anchors = bits, anchors
        self.register_buffer("A", torch.randn(num_heads, bits, anchors))
        self.register_buffer("mvec", torch.zeros(1, num_heads, 1, anchors))
        points = torch.randn(1, num_heads, anchors, head_dim)
        self.register_buffer("anchor", F.normalize(points, dim=-1))

    @property
    def fitted(self) -> bool:
        """True after a fit, or after a fitted hash was loaded: means of kernel values are not 0."""
        return bool((self.mvec != 0).any())

    def scores(self, x: Tensor) -> Tensor:
        """The values y, whose signs are the codes: (B, num_heads, N, bits)."""
        return (kernel_values(x, self.anchor) - self.mvec) @ self.A.transpose(-2, -1)

    def forward(self, x: Tensor) -> Tensor:
        return clipped_sign(self.scores(x))


def kernel_values(x: Tensor, anchor: Tensor) -> Tensor:
    """Gaussian kernel values of vectors and anchors. Each image and head has its own width.

    Args:
        x: unit vectors (B, heads, N, head_dim).
        anchor: (1, heads, m, head_dim), of any length.
    Returns:
        (B, heads, N, m).
    """
    squares = anchor.square().sum(-1).unsqueeze(-2)
    distances = (1 + squares - 2 * (x @ anchor.transpose(-2, -1))).clamp(min=0)
    scale = -0.5 * distances.mean((-2, -1), keepdim=True).reciprocal()
    return (distances * scale).exp()
