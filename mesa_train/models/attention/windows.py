"""Attention in windows: Swin's, shifted or not, and CSWin's crossed stripes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.models.common.swin import in_windows, shift_mask

from .base import AttentionLayer, pad_to_multiple, padded_tokens


class WindowAttention(AttentionLayer):
    """Attention in windows (Swin, arXiv 2103.14030), without relative position biases.

    A map is padded with zeros to multiples of the window, and tokens attend to the zeros. The
    published benchmark has no position biases. Swin itself adds (2 window - 1)^2 of them a head.

    Args:
        window: side in tokens; default 7.
    """

    shifts = False

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, window: int = 7
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("window", window, 1)
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = pad_to_multiple(x, self.window)
        shift = self.shift(*padded.shape[1:3])
        mask = self.mask(padded) if shift else None

        def attend(windows: Tensor) -> Tensor:
            return self._attend(windows, len(x), mask)

        out = in_windows(padded, (self.window, self.window), shift, attend)
        return out[:, :height, :width]

    def shift(self, height: int, width: int) -> int:
        """Tokens by which a padded map rolls. A map of one row or column of windows does not."""
        return self.window // 2 if self.shifts and min(height, width) > self.window else 0

    def mask(self, padded: Tensor) -> Tensor:
        """(1, windows * num_heads, N, N), with -100 between tokens that are no neighbours."""
        grid = (padded.shape[1], padded.shape[2])
        mask = shift_mask(grid, (self.window, self.window), self.shift(*grid))
        mask = mask.to(padded.device).repeat_interleave(self.num_heads, dim=0)
        return mask.unsqueeze(0)

    def flops(self, height: int, width: int) -> int:
        c, tokens = self.dim, padded_tokens(height, width, self.window)
        return tokens * (4 * c * c + 2 * self.window**2 * c)

    def _attend(self, windows: Tensor, batch: int, mask: Tensor | None) -> Tensor:
        """Attention of windows (batch * count, N, dim)."""
        count, tokens, dim = windows.shape
        qkv = self.qkv(windows).view(count, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            # Windows and heads in one dim: the mask of one image then holds for all images.
            q, k, v = (t.reshape(batch, -1, tokens, self.head_dim) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
            out = out.view(count, self.num_heads, tokens, self.head_dim)
        return self.proj(out.transpose(1, 2).reshape(count, tokens, dim))


class ShiftedWindowAttention(WindowAttention):
    """`WindowAttention` whose map rolls by half a window first, and back afterwards.

    Args:
        window: side in tokens; default 7.
    """

    shifts = True


class CrossWindowAttention(AttentionLayer):
    """CSWin's attention (arXiv 2107.00652) in stripes, with locally enhanced positions.

    Half of the heads attend in vertical stripes (H x stripe), the others in horizontal stripes
    (stripe x W). A 3x3 depthwise convolution of the values inside each stripe is added.

    Args:
        stripe: width of a stripe in tokens; default 7; must divide the map's sides.
    Raises:
        ValueError: an odd number of heads, or `stripe` does not divide the map.
    """

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, stripe: int = 7
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_multiple("num_heads", num_heads, "halves", 2)
        self.check_least("stripe", stripe, 1)
        self.stripe = stripe
        self.check_size(height, width)
        half = dim // 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.positions = nn.ModuleList(
            nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in range(2)
        )
        self.proj = nn.Linear(dim, dim)

    def check_size(self, height: int, width: int) -> None:
        self.check_multiple("height", height, "stripe", self.stripe)
        self.check_multiple("width", width, "stripe", self.stripe)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, 2, self.dim // 2))
        stripes = ((height, self.stripe), (self.stripe, width))
        halves = [self._attend(qkv[..., i, :], *stripes[i], self.positions[i]) for i in range(2)]
        return self.proj(torch.cat(halves, dim=-1))

    def flops(self, height: int, width: int) -> int:
        c, tokens = self.dim, height * width
        keys = self.stripe * (height + width)  # of both halves, each of c / 2 channels
        return tokens * (4 * c * c + 9 * c + keys * c)

    def _attend(self, qkv: Tensor, rows: int, columns: int, positions: nn.Module) -> Tensor:
        """Attention of (B, H, W, 3, C) in stripes of rows x columns: (B, H, W, C)."""
        batch, height, width, _, channels = qkv.shape
        down, across = height // rows, width // columns
        parts = qkv.reshape(batch, down, rows, across, columns, 3, channels)
        parts = parts.permute(5, 0, 1, 3, 2, 4, 6).reshape(3, -1, rows * columns, channels)
        q, k, v = parts.unflatten(-1, (self.num_heads // 2, self.head_dim)).transpose(2, 3)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        maps = parts[2].transpose(1, 2).unflatten(2, (rows, columns))
        out = out + positions(maps).flatten(2).transpose(1, 2)
        out = out.view(batch, down, across, rows, columns, channels)
        return out.transpose(2, 3).reshape(batch, height, width, channels)
