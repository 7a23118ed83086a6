"""QuadTree attention (arXiv 2201.02767), variant B with two levels, in plain PyTorch.

The authors compute the fine level with CUDA operators. This file gathers the children of the chosen
keys, which needs 8N keys and values of width C an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import AttentionLayer


class QuadTreeAttention(AttentionLayer):
    """Coarse attention of 2x2 means, then fine attention to the children of the best coarse keys.

    - Coarse: each query attends to all keys. Its `top` keys of largest weight are chosen, per head.
    - Fine: the 4 children of a coarse query attend to the 4 children of each chosen key. A softmax
      is over the 4 children of one key, so a query's weights sum to `top`.
    - A 3x3 depthwise convolution of the values is added on each level.
    - The output is the sum of both levels, weighted by a softmax of two parameters.

    Args:
        top: chosen keys; default 8.
    Raises:
        ValueError: a side is odd, or the coarse map has fewer tokens than `top`.
    """

    def __init__(self, dim: int, num_heads: int, height: int, width: int, *, top: int = 8) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("top", top, 1)
        self.top = top
        self.check_size(height, width)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.down = nn.Sequential(
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 2, stride=2),
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )
        self.positions = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2)
        )
        self.levels = nn.Parameter(torch.randn(2))
        self.proj = nn.Linear(dim, dim)

    def check_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"{self.kind}: sides must be even, got {height}x{width}")
        if height * width // 4 < self.top:
            raise ValueError(
                f"{self.kind}: maps of {height}x{width} have {height * width // 4} coarse keys, "
                f"fewer than top={self.top}"
            )

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        fine_map = v.permute(0, 3, 1, 2)
        coarse_map = self.down(fine_map)
        coarse, chosen = self._coarse(_cells(q).mean(2), _cells(k).mean(2), coarse_map)
        fine = self._fine(_cells(q), _cells(k), _cells(v), chosen)
        fine = _from_cells(fine, *x.shape[1:3]) + self.positions[1](fine_map).permute(0, 2, 3, 1)
        coarse = coarse.unflatten(1, (x.shape[1] // 2, x.shape[2] // 2))
        coarse = coarse + self.positions[0](coarse_map).permute(0, 2, 3, 1)
        coarse = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        shares = self.levels.softmax(0)
        return self.proj(shares[0] * coarse + shares[1] * fine)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds. As in the published count, without the fine level's `fine_flops`."""
        c, tokens, cells = self.dim, height * width, height * width // 4
        branch = cells * 5 * c * c + (5 + 9) * (tokens + cells) * c
        return 4 * tokens * c * c + branch + 2 * cells * cells * c

    def fine_flops(self, height: int, width: int) -> int:
        """Multiply-adds of the fine level's attention."""
        return 2 * height * width * 4 * self.top * self.dim

    def _coarse(self, q: Tensor, k: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Messages (B, cells, dim), and the chosen keys (B, heads, cells, top)."""
        q, k, v = (self.split_heads(t) for t in (q, k, values.flatten(2).transpose(1, 2)))
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        chosen = weights.detach().topk(self.top, dim=-1).indices
        return (weights @ v).transpose(1, 2).flatten(2), chosen

    def _fine(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """Messages (B, cells, 4, dim) of queries, keys and values of that shape."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).permute(0, 3, 1, 2, 4)
            for t in (q, k, v)
        )  # (B, heads, cells, 4, head_dim)
        k, v = (self._children(t, chosen) for t in (k, v))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = scores.unflatten(-1, (self.top, 4)).softmax(-1).flatten(-2)
        return (weights @ v).permute(0, 2, 3, 1, 4).flatten(3)

    def _children(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, heads, cells, 4 top, head_dim): the children of the chosen cells of each cell."""
        cells = x.flatten(3)
        index = chosen.flatten(2).unsqueeze(-1).expand(-1, -1, -1, cells.shape[-1])
        children = cells.gather(2, index)
        return children.view(*chosen.shape[:3], 4 * self.top, self.head_dim)


def _cells(x: Tensor) -> Tensor:
    """A map (B, H, W, C) in cells of 2x2: (B, H W / 4, 4, C)."""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, dim)
    return x.transpose(2, 3).reshape(batch, -1, 4, dim)


def _from_cells(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_cells`."""
    batch, dim = len(x), x.shape[-1]
    x = x.reshape(batch, height // 2, width // 2, 2, 2, dim)
    return x.transpose(2, 3).reshape(batch, height, width, dim)
