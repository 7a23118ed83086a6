"""EcoFormer's attention (arXiv 2209.09004): linear attention over binary codes, in O(N).

Queries and keys are one projection of the tokens, normalised and hashed to codes h of `bits` bits.
With c = bits + 1 and values v,

    kernel="official":   out_n = (h_n . sum_j h_j v_j^T + c v_n)       / (sum_j h_n . h_j + c N)
    kernel="consistent": out_n = (h_n . sum_j h_j v_j^T + c sum_j v_j) / (sum_j h_n . h_j + c N)

"consistent" is the attention of the similarity h_n . h_j + c: its weights sum to 1. "official" is
the authors' code, and the form of their checkpoints: in the numerator the shift has the token's
own value in place of the sum of all values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mesa_train.models.lit.deformable_merging import without_autocast

from .hashing import KernelHash

KERNELS = ("official", "consistent")


class HashedKernel(nn.Module):
    """Linear attention of values, by codes of normalised vectors.

    Args:
        num_heads: heads.
        head_dim: width of a head.
        kernel: "official" (default) or "consistent".
        bits: of a code; default 16.
        anchors: of the hash; default 25.
    Raises:
        ValueError: `kernel` is another name.
    """

    projection_matrix: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kernel: str = "official",
        bits: int = 16,
        anchors: int = 25,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.kernel, self.shift = kernel, bits + 1
        # The authors' files hold this matrix, and nothing reads it.
        rows = int(head_dim * math.log(head_dim))
        self.register_buffer("projection_matrix", torch.zeros(rows, head_dim))
        self.ksh = KernelHash(num_heads, head_dim, bits, anchors)

    def codes(self, qk: Tensor) -> Tensor:
        """Codes (B, num_heads, N, bits) of vectors (B, num_heads, N, head_dim), at least float32."""
        return self.ksh(self.normalized(qk))

    def normalized(self, qk: Tensor) -> Tensor:
        """Unit vectors of vectors, at least float32."""
        return F.normalize(qk.to(torch.promote_types(qk.dtype, torch.float32)), dim=-1)

    def forward(self, qk: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            qk: queries and keys (B, num_heads, N, head_dim).
            v: values of the same shape.
        Returns:
            (B, num_heads, N, head_dim), in the dtype of `v`.
        """
        with without_autocast(qk.device.type):
            h = self.codes(qk)
        products = h.transpose(-2, -1).to(v.dtype) @ v  # (B, num_heads, bits, head_dim)
        with without_autocast(qk.device.type):
            counts = h.sum(-2).unsqueeze(-1)
            both = h @ torch.cat([products.to(h.dtype), counts], dim=-1)
            numerator, total = both[..., :-1], both[..., -1:]
            values = v.to(h.dtype)
            own = values if self.kernel == "official" else values.sum(-2, keepdim=True)
            total = total + self.shift * h.shape[-2]
            # A product and not a quotient: mesa_train saves codes of a product's factors.
            out = (numerator + self.shift * own) * total.reciprocal()
        return out.to(v.dtype)


class EcoFormerAttention(nn.Module):
    """Hashed linear self-attention of tokens (B, N, dim), or of a map (B, H, W, dim).

    Parameters have the names of the authors' code.

    Args:
        dim: width.
        num_heads: must divide `dim`; default 8.
        kernel: "official" (default) or "consistent".
        bits: of a code; default 16.
        anchors: of the hash; default 25.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel: str = "official",
        bits: int = 16,
        anchors: int = 25,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.to_qk = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.fast_attention = HashedKernel(num_heads, dim // num_heads, kernel, bits, anchors)

    def forward(self, x: Tensor) -> Tensor:
        v = self._heads(self.to_v(x))
        out = self.fast_attention(self._heads(self.to_qk(x)), v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def unit_vectors(self, x: Tensor) -> Tensor:
        """The normalised queries and keys of an input: (B, num_heads, N, head_dim)."""
        return self.fast_attention.normalized(self._heads(self.to_qk(x)))

    def operations(self, tokens: int) -> tuple[int, int]:
        """(multiplications, additions) of one image without the projections, as the authors count.

        The exponentials and quotients do not count.
        """
        h = self.fast_attention.ksh
        heads, dim = self.num_heads, self.to_v.weight.shape[0]
        m, b, d = h.anchors, h.bits, dim // heads
        n = heads * tokens
        return (
            n * (2 * m + m * b + b + 1 + d),
            n * (2 * m * d + m * b + 2 * b + 2 * b * d + d),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)


class MapAttention(Attention):
    """timm's softmax attention, for a map (B, H, W, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def operations(self, tokens: int) -> tuple[int, int]:
        """(multiplications, additions) of one image without the projections, as the authors count."""
        products = 2 * tokens**2 * self.proj.weight.shape[0]
        return products + self.num_heads * tokens**2, products
