"""Attention in linear time: Linformer's projected keys and Performer's random features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.models.lit.deformable_merging import without_autocast

from .base import AttentionLayer

_FLOOR = 1e-4  # Performer adds it to each feature.


class Linformer(AttentionLayer):
    """Attention to `keys` learned combinations of the tokens (arXiv 2006.04768).

    All heads share the two matrices (N, keys).

    Args:
        keys: number of combinations; default 256, as in the published benchmark.
    """

    fixed_size = True

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, keys: int = 256
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("keys", keys, 1)
        self.keys = keys
        self.qkv = nn.Linear(dim, 3 * dim)
        bound = keys**-0.5
        matrices = [torch.empty(height * width, keys).uniform_(-bound, bound) for _ in range(2)]
        self.project_k, self.project_v = (nn.Parameter(matrix) for matrix in matrices)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        k, v = self.project_k.t() @ k, self.project_v.t() @ v  # (B, heads, keys, head_dim)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def flops(self, height: int, width: int) -> int:
        return height * width * (4 * self.dim**2 + 4 * self.keys * self.dim)


class Performer(AttentionLayer):
    """Softmax attention approximated by positive random features, FAVOR+ (arXiv 2009.14794).

    With rows w of `directions` and x' = x head_dim^-1/4, a query or key x has the features

        features^-1/2 (exp(w . x' - |x'|^2 / 2 - max) + 1e-4).

    A query's max is over its features. The max of keys is one number of the whole batch. Thus, by
    the 1e-4, an image's result depends on its batch. Features and sums are at least float32.

    Args:
        features: of a query or key; default 256, as in the published benchmark.
    """

    directions: Tensor

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, features: int = 256
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("features", features, 1)
        self.features = features
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("directions", orthogonal_directions(features, self.head_dim))

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        with without_autocast(x.device.type):
            q, k, values = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
            q, k = self._features(q, of_keys=False), self._features(k, of_keys=True)
            total = q @ k.sum(-2).unsqueeze(-1)
            out = (q @ (k.transpose(-2, -1) @ values)) * total.reciprocal()
        return self.proj(out.to(v.dtype).transpose(1, 2).reshape(x.shape))

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds. The published count has half a multiply-add for each element of output."""
        c, tokens = self.dim, height * width
        sums = self.num_heads * self.features
        return tokens * (4 * c * c + 4 * self.features * c + sums) + tokens * c // 2

    def _features(self, x: Tensor, *, of_keys: bool) -> Tensor:
        """Random features (B, heads, N, features) of (B, heads, N, head_dim)."""
        x = x * self.head_dim**-0.25
        scores = x @ self.directions.to(x.dtype).t()
        most = scores.detach()
        most = most.amax() if of_keys else most.amax(-1, keepdim=True)
        exponents = scores - x.square().sum(-1, keepdim=True) / 2 - most
        return (exponents.exp() + _FLOOR) * self.features**-0.5


def orthogonal_directions(count: int, dim: int) -> Tensor:
    """Random vectors (count, dim), orthogonal in blocks of `dim`, as long as Gaussian vectors.

    Signs are random, unlike in the authors' code. LAPACK's QR decomposition determines the signs of
    some entries, and without the random signs the features would be biased.
    """
    blocks = [torch.linalg.qr(torch.randn(dim, dim))[0].t() for _ in range(-(-count // dim))]
    lengths = torch.randn(count, dim).norm(dim=1, keepdim=True) * torch.randn(count, 1).sign()
    return torch.cat(blocks)[:count] * lengths
