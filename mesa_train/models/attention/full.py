"""Adapters of timm's layers: full attention, spatial reduction (PVT), Twins and XCA (XCiT).

| layer | attends | multiply-adds of N tokens of width C, K = N / r^2 |
|---|---|---|
| MSA | each token to all tokens | 4NC^2 + 2N^2 C |
| SRA | each token to a map that a convolution reduces by r | 2NC^2 + K(r^2 + 2)C^2 + 2NKC + 5KC |
| LinearSRA | each token to 7x7 pooled tokens | 2NC^2 + 3 * 49 C^2 + 2 * 49 NC |
| TwinsLocal | inside windows, without shift and mask | 4NC^2 + 2N window^2 C |
| TwinsGlobal | as SRA | as SRA |
| XCA | channels of a head to channels | 4NC^2 + 2NC head_dim |
"""

from __future__ import annotations

from typing import Any

from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.vision_transformer import Attention
from timm.models.xcit import XCA as XCiTAttention
from torch import Tensor

from .base import AttentionLayer, padded_tokens

_POOLED = 49  # tokens of PVTv2's linear attention


class MSA(AttentionLayer):
    """Attention of each token to all tokens (arXiv 2010.11929)."""

    def __init__(self, dim: int, num_heads: int, height: int, width: int) -> None:
        super().__init__(dim, num_heads, height, width)
        self.attn = Attention(dim, num_heads, qkv_bias=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        tokens = height * width
        return tokens * (4 * self.dim**2 + 2 * tokens * self.dim)


class XCA(AttentionLayer):
    """Cross-covariance attention of XCiT (arXiv 2106.09681), without its local patch interaction."""

    def __init__(self, dim: int, num_heads: int, height: int, width: int) -> None:
        super().__init__(dim, num_heads, height, width)
        self.attn = XCiTAttention(dim, num_heads, qkv_bias=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        return height * width * (4 * self.dim**2 + 2 * self.dim * self.head_dim)


class SRA(AttentionLayer):
    """Spatial reduction attention of PVT (arXiv 2102.12122).

    A convolution of `ratio x ratio` with that stride makes the map of keys and values. Rows and
    columns beyond a multiple of `ratio` make no keys.

    Args:
        ratio: of the reduction; default 2.
    """

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, ratio: int = 2
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("ratio", ratio, 1)
        self.ratio = ratio
        self.check_size(height, width)
        self.attn = self.build()

    def build(self) -> Any:
        """timm's layer, which takes tokens and the size of the map."""
        return PVTAttention(self.dim, self.num_heads, sr_ratio=self.ratio, linear_attn=False)

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < self.ratio:
            raise ValueError(
                f"{self.kind}: maps must be at least {self.ratio}x{self.ratio} (ratio), got "
                f"{height}x{width}"
            )

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        c, r = self.dim, self.ratio
        tokens, keys = height * width, (height // r) * (width // r)
        reduction = keys * (r * r * c * c + 5 * c) if r > 1 else 0
        return 2 * tokens * c * c + reduction + 2 * keys * c * c + 2 * tokens * keys * c


class TwinsGlobal(SRA):
    """Twins-SVT's global attention (arXiv 2104.13840), a spatial reduction.

    Args:
        ratio: of the reduction; default 2.
    """

    def build(self) -> Any:
        return GlobalSubSampleAttn(self.dim, self.num_heads, sr_ratio=self.ratio)


class LinearSRA(AttentionLayer):
    """PVTv2's linear attention (arXiv 2106.13797): keys and values are 7x7 pooled tokens."""

    def __init__(self, dim: int, num_heads: int, height: int, width: int) -> None:
        super().__init__(dim, num_heads, height, width)
        self.attn = PVTAttention(dim, num_heads, linear_attn=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        c, tokens = self.dim, height * width
        return 2 * tokens * c * c + _POOLED * (3 * c * c + 5 * c) + 2 * tokens * _POOLED * c


class TwinsLocal(AttentionLayer):
    """Twins-SVT's local attention (arXiv 2104.13840): windows without shift, mask and biases.

    A map is padded with zeros to multiples of the window, and tokens attend to the zeros.

    Args:
        window: side in tokens; default 7.
    """

    def __init__(
        self, dim: int, num_heads: int, height: int, width: int, *, window: int = 7
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.check_least("window", window, 2)
        self.window = window
        self.attn = LocallyGroupedAttn(dim, num_heads, ws=window)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        c, padded = self.dim, padded_tokens(height, width, self.window)
        return padded * (3 * c * c + 2 * self.window**2 * c) + height * width * c * c
