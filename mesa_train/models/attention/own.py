"""HiLo and EcoFormer's attention with the common signature."""

from __future__ import annotations

from torch import Tensor

from mesa_train.models.ecoformer.attention import EcoFormerAttention
from mesa_train.models.lit.hilo import HiLo

from .base import AttentionLayer


class HiLoAttention(AttentionLayer):
    """`mesa_train.models.lit.hilo.HiLo` with biases.

    Args:
        window: side in tokens; default 2.
        alpha: share of heads that attend globally; default 0.9.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        height: int,
        width: int,
        *,
        window: int = 2,
        alpha: float = 0.9,
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.attn = HiLo(dim, num_heads, window=window, alpha=alpha, qkv_bias=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def flops(self, height: int, width: int) -> int:
        return self.attn.flops(height, width)


class EcoFormerLayer(AttentionLayer):
    """`mesa_train.models.ecoformer.attention.EcoFormerAttention`, not fitted.

    Args:
        kernel: "official" (default) or "consistent".
        bits: of a code; default 16.
        anchors: of the hash; default 25.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        height: int,
        width: int,
        *,
        kernel: str = "official",
        bits: int = 16,
        anchors: int = 25,
    ) -> None:
        super().__init__(dim, num_heads, height, width)
        self.attn = EcoFormerAttention(dim, num_heads, kernel, bits, anchors)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds. Those with codes of -1 and 1 are additions on suitable hardware."""
        c, h = self.dim, self.num_heads
        hashed = self.attn.fast_attention.ksh
        m, b = hashed.anchors, hashed.bits
        return height * width * (3 * c * c + m * c + h * m * b + b * c + b * (c + h))
