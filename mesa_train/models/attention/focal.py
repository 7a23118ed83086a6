"""Focal attention (arXiv 2107.00641) of two levels: fine keys nearby, pooled keys around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from .base import AttentionLayer, windows_of

_AROUND = 3  # Pooled keys are of the 3x3 windows around a query's own.
_MASKED = -100.0


class FocalAttention(AttentionLayer):
    """Attention of each window to itself, to the tokens around it, and to pooled windows.

    - Tokens around: the map rolls by half a window in the four diagonal directions. Kept are the
      keys outside the query's window. They wrap around the border of the map without a mask, and
      four bands of them come twice, as in the authors' code.
    - Pooled windows: one learned Linear averages the tokens of a window. The layer's own projection
      then makes keys and values. Windows beyond the border are masked.

    Args:
        window: side in tokens; default 7; must divide the map's sides.
    Raises:
        ValueError: the window does not divide the map.
    """

    outside: Tensor
    window_index: Tensor
    pooled_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, window: int = 7
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("window", window, 2)
        self.window, self.reach = window, window // 2
        self.check_size(height, width)
        area = window * window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.pool = nn.Linear(area, 1)
        nn.init.constant_(self.pool.weight, 1 / area)
        nn.init.zeros_(self.pool.bias)
        self.register_buffer("outside", self._outside(), persistent=False)
        index = get_relative_position_index(window, window)
        self.register_buffer("window_index", index, persistent=False)
        self.register_buffer("pooled_index", _pooled_index(window), persistent=False)
        self.window_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.outside_bias = nn.Parameter(torch.empty(num_heads, area, len(self.outside)))
        self.pooled_bias = nn.Parameter(torch.empty(num_heads, (window + _AROUND - 1) ** 2))
        trunc_normal_(self.outside_bias, std=0.02)
        trunc_normal_(self.pooled_bias, std=0.02)

    def check_size(self, height: int, width: int) -> None:
        self.check_multiple("height", height, "window", self.window)
        self.check_multiple("width", width, "window", self.window)

    @property
    def keys(self) -> int:
        """Keys of a query."""
        return self.window**2 + len(self.outside) + _AROUND**2

    def mix(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        q, kv = self.qkv(x).split((dim, 2 * dim), dim=-1)
        # (B, windows, keys, 2 dim)
        keys_values = torch.cat([windows_of(kv, self.window), *self._others(x, kv)], dim=2)
        k, v = (self._heads(t) for t in keys_values.chunk(2, dim=-1))
        q = self._heads(windows_of(q, self.window))
        bias = self._biases(height // self.window, width // self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        rows, columns = height // self.window, width // self.window
        out = out.view(
            batch, rows, columns, self.num_heads, self.window, self.window, self.head_dim
        )
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
        return self.proj(out)

    def flops(self, height: int, width: int) -> int:
        c, tokens, area = self.dim, height * width, self.window**2
        windows = tokens // area
        attention = 2 * tokens * self.keys * c
        return 4 * tokens * c * c + 3 * windows * c * c + attention + area * windows * c

    def _others(self, x: Tensor, kv: Tensor) -> list[Tensor]:
        """Keys with values (B, windows, count, 2 dim): those around, then the pooled ones."""
        rolled = [windows_of(kv.roll(shift, (1, 2)), self.window) for shift in self._shifts()]
        around = torch.cat(rolled, dim=2).index_select(2, self.outside)
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        means = self.pool(windows_of(x, self.window).transpose(2, 3)).squeeze(-1)
        pooled = self.qkv(means)[..., self.dim :].unflatten(1, (rows, columns))
        patches = F.unfold(pooled.permute(0, 3, 1, 2), _AROUND, padding=_AROUND // 2)
        patches = patches.unflatten(1, (2 * self.dim, _AROUND**2))
        return [around, patches.permute(0, 3, 2, 1)]

    def _biases(self, rows: int, columns: int) -> Tensor:
        """Biases and masks of scores: (1, windows * num_heads, window^2, keys)."""
        area = self.window**2
        own = self.window_bias[self.window_index.flatten()].view(area, area, self.num_heads)
        pooled = self.pooled_bias[:, self.pooled_index.flatten()]
        pooled = pooled.view(self.num_heads, area, _AROUND**2)
        ones = pooled.new_ones(1, 1, rows, columns)
        inside = F.unfold(ones, _AROUND, padding=_AROUND // 2)[0].t()  # (windows, 9)
        pooled = pooled + ((1 - inside) * _MASKED)[:, None, None]
        fine = torch.cat([own.permute(2, 0, 1), self.outside_bias], dim=-1)
        fine = fine.expand(rows * columns, -1, -1, -1)
        return torch.cat([fine, pooled], dim=-1).flatten(0, 1).unsqueeze(0)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, windows, N, dim) to (B, windows * num_heads, N, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(2, 3).flatten(1, 2)

    def _shifts(self) -> list[tuple[int, int]]:
        """The four rolls."""
        signs = ((-1, -1), (-1, 1), (1, -1), (1, 1))
        return [(self.reach * y, self.reach * x) for y, x in signs]

    def _outside(self) -> Tensor:
        """Indices, among the four rolled windows' tokens, of those outside the query's window."""
        sides = range(self.window)
        tokens = [
            y + down in sides and x + right in sides
            for down, right in ((-y, -x) for y, x in self._shifts())
            for y in sides
            for x in sides
        ]
        return torch.tensor([index for index, own in enumerate(tokens) if not own])


def _pooled_index(window: int) -> Tensor:
    """(window^2, 9): the bias of a token and one of the 3x3 windows around."""
    tokens, around = torch.arange(window), torch.arange(_AROUND)
    offset = tokens[:, None] - around[None, :] + _AROUND - 1  # (window, 3)
    side = window + _AROUND - 1
    index = offset[:, None, :, None] * side + offset[None, :, None, :]
    return index.reshape(window * window, _AROUND**2)
