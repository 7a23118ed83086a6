"""Deformable attention, DAT (arXiv 2201.00520): keys at learned, moving positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .base import AttentionLayer


class DeformableAttention(AttentionLayer):
    """Attention of each token to N tokens that are sampled from the map at moved positions.

    Queries of one group of channels give the offsets of that group's positions, at most `reach`
    cells. Keys and values are projections of bilinear samples of the input. A table of relative
    position biases is sampled, too, at half the distance of a query and a position. As in the
    authors' code, positions are centres of cells, and samples are with `align_corners`.

    Args:
        groups: of channels; default 3; must divide `num_heads`.
        kernel: side of the offsets' depthwise convolution; default 5; odd.
        reach: default 2.
    Raises:
        ValueError: also if `groups` does not divide `num_heads`, or `kernel` is even.
    """

    fixed_size = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        height: int,
        width: int,
        *,
        groups: int = 3,
        kernel: int = 5,
        reach: float = 2.0,
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("groups", groups, 1)
        self.check_multiple("num_heads", num_heads, "groups", groups)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"{self.kind}: kernel must be odd, got {kernel}")
        self.groups, self.kernel, self.reach = groups, kernel, reach
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        channels = dim // groups
        self.offset_conv = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels
        )
        self.offset_norm = nn.LayerNorm(channels)
        self.offset_proj = nn.Linear(channels, 2, bias=False)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * height - 1, 2 * width - 1))
        trunc_normal_(self.bias_table, std=0.01)

    def mix(self, x: Tensor) -> Tensor:
        q = self.q(x)
        positions = self.positions(q)  # (B * groups, H, W, 2)
        maps = self._grouped(x).to(positions.dtype)
        samples = F.grid_sample(maps, positions.flip(-1), align_corners=True)
        samples = samples.view(len(x), self.dim, -1).transpose(1, 2).to(x.dtype)
        k, v = self.split_heads(self.k(samples)), self.split_heads(self.v(samples))
        bias = self.biases(positions).to(q.dtype)
        out = F.scaled_dot_product_attention(self.split_heads(q), k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def positions(self, q: Tensor) -> Tensor:
        """Positions (B * groups, H, W, 2) as (y, x) in [-1, 1], at least float32, of queries."""
        height, width = self.size
        offsets = self.offset_conv(self._grouped(q)).permute(0, 2, 3, 1)
        offsets = self.offset_proj(F.gelu(self.offset_norm(offsets)))
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32)).tanh()
        most = offsets.new_tensor([self.reach / height, self.reach / width])
        return self._centres(offsets) + offsets * most

    def biases(self, positions: Tensor) -> Tensor:
        """Biases (B, num_heads, queries, keys) of the scores."""
        height, width = self.size
        tokens = height * width
        queries = self._centres(positions).view(1, tokens, 1, 2)
        distances = (queries - positions.view(-1, 1, tokens, 2)) * 0.5
        table = self.bias_table.view(self.groups, -1, 2 * height - 1, 2 * width - 1)
        table = table.repeat(len(positions) // self.groups, 1, 1, 1).to(distances.dtype)
        sampled = F.grid_sample(table, distances.flip(-1), align_corners=True)
        return sampled.view(-1, self.num_heads, tokens, tokens)

    def flops(self, height: int, width: int) -> int:
        c, tokens = self.dim, height * width
        offsets = self.kernel**2 + 5 + 2  # convolution, norm, projection to two numbers
        samples = 4 * tokens * c + 4 * self.num_heads * tokens**2
        return 4 * tokens * c * c + 2 * tokens**2 * c + tokens * c * offsets + samples

    def _grouped(self, x: Tensor) -> Tensor:
        """A map (B, H, W, dim) as (B * groups, dim / groups, H, W)."""
        x = x.permute(0, 3, 1, 2)
        return x.reshape(-1, self.dim // self.groups, *x.shape[2:])

    def _centres(self, like: Tensor) -> Tensor:
        """Centres of cells (H, W, 2) as (y, x) in [-1, 1]."""
        rows, columns = (
            (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) * (2 / side) - 1
            for side in self.size
        )
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
