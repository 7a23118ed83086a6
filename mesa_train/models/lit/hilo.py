"""HiLo attention (arXiv 2205.13213): some heads attend locally, others globally at low resolution.

Hi-Fi heads attend inside windows of `window x window` tokens. Lo-Fi heads attend from every token
to the map averaged over those windows. Of h heads, int(h * alpha) are Lo-Fi.

If the window does not divide a map, the map is padded with zeros on the right and at the bottom,
without a mask, as in the authors' code for dense prediction. Any height and width work, and no
parameter depends on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HiLo(nn.Module):
    """Self-attention of a token map (B, H, W, dim), to the same shape.

    Parameters have the names of the authors' code.

    Args:
        dim: width.
        num_heads: default 8; must divide `dim`.
        window: side of a window in tokens; default 2. With 1, every head attends to every token,
            for any `alpha`.
        alpha: share of Lo-Fi heads; default 0.5; in [0, 1].
        qkv_bias: biases of queries, keys and values; default false.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"HiLo: dim={dim} must be a multiple of num_heads={num_heads}")
        if window < 1:
            raise ValueError(f"HiLo: window must be at least 1, got {window}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLo: alpha must be from 0 to 1, got {alpha}")
        self.dim, self.num_heads, self.window, self.alpha = dim, num_heads, window, alpha
        self.head_dim = dim // num_heads
        self.lo_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.hi_heads = num_heads - self.lo_heads
        self.lo_dim, self.hi_dim = self.lo_heads * self.head_dim, self.hi_heads * self.head_dim
        if self.lo_heads:
            self.l_q = nn.Linear(dim, self.lo_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * self.lo_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(self.lo_dim, self.lo_dim)
        if self.hi_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.hi_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(self.hi_dim, self.hi_dim)

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        padded = self._pad(x)
        if self.hi_heads:
            branches.append(self.hi_fi(padded)[:, : x.shape[1], : x.shape[2]])
        if self.lo_heads:
            branches.append(self.lo_fi(x, padded))
        return torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0]

    def hi_fi(self, x: Tensor) -> Tensor:
        """Attention inside windows that divide H and W: (B, H, W, dim) to (B, H, W, hi_dim)."""
        batch, height, width, _ = x.shape
        s = self.window
        rows, columns = height // s, width // s
        qkv = self.h_qkv(x).view(batch, rows, s, columns, s, 3, self.hi_heads, self.head_dim)
        q, k, v = (
            qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)
            .reshape(3, batch * rows * columns, self.hi_heads, s * s, self.head_dim)
            .unbind(0)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.reshape(batch, rows, columns, self.hi_heads, s, s, self.head_dim)
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, self.hi_dim)
        return self.h_proj(out)

    def lo_fi(self, x: Tensor, padded: Tensor) -> Tensor:
        """Attention of every token of x to the means of `padded`'s windows: (B, H, W, lo_dim)."""
        batch, height, width, _ = x.shape
        s = self.window
        q = self.l_q(x).view(batch, height * width, self.lo_heads, self.head_dim).transpose(1, 2)
        if s > 1:
            # A mean over windows equals average pooling, and saves less than a pooling kernel
            # would.
            _, high, wide, _ = padded.shape
            padded = padded.reshape(batch, high // s, s, wide // s, s, self.dim).mean((2, 4))
        kv = self.l_kv(padded).view(batch, -1, 2, self.lo_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.l_proj(out.transpose(1, 2).reshape(batch, height, width, self.lo_dim))

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the matmuls for one map, without softmax, pooling and biases."""
        s = self.window
        tokens = (height + -height % s) * (width + -width % s)
        pooled = tokens // (s * s)
        c, hi, lo = self.dim, self.hi_dim, self.lo_dim
        hi_fi = tokens * (3 * c * hi + 2 * s * s * hi + hi * hi)
        lo_fi = tokens * (c * lo + 2 * pooled * lo + lo * lo) + 2 * pooled * c * lo
        return hi_fi + lo_fi

    def _pad(self, x: Tensor) -> Tensor:
        """Pad a map with zeros to a multiple of the window."""
        s = self.window
        bottom, right = -x.shape[1] % s, -x.shape[2] % s
        return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x

    def extra_repr(self) -> str:
        """The arguments for printing."""
        return (
            f"{self.dim}, hi_heads={self.hi_heads}, lo_heads={self.lo_heads}, window={self.window}"
        )
