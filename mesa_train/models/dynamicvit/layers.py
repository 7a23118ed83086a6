"""Layers of DynamicViT's backbones: the block with masked attention, and LV-ViT's stem."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from mesa_train.models.common.vit import patch_grid
from mesa_train.models.lit.pyramid import Mlp

from .masked_attention import masked_attention


class PolicyAttention(nn.Module):
    """Self-attention of tokens (B, N, dim). With a policy, dropped tokens are masked.

    Args:
        dim: width.
        num_heads: must divide `dim`.
        qkv_bias: biases of queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, dim).
            policy: (B, N, 1), 1 for kept tokens and 0 for dropped tokens; default: all are kept.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if policy is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = masked_attention(q, k, v, policy, self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class PolicyBlock(nn.Module):
    """A pre-norm block of tokens (B, N, dim) whose attention takes a policy.

    Args:
        dim: width.
        num_heads: heads of the attention.
        mlp_ratio: of the MLP's hidden width to `dim`.
        qkv_bias: biases of queries, keys and values.
        eps: of the norms.
        residual_divisor: divides both branches; LV-ViT has 2.
        drop_path: rate of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        eps: float,
        residual_divisor: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = PolicyAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, mlp_ratio, depthwise=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.residual_divisor = residual_divisor

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        x = x + self._scaled(self.drop_path(self.attn(self.norm1(x), policy)))
        return x + self._scaled(self.drop_path(self.mlp(self.norm2(x))))

    def _scaled(self, branch: Tensor) -> Tensor:
        return branch if self.residual_divisor == 1 else branch / self.residual_divisor

    def flops(self, tokens: int) -> int:
        """Multiply-adds of the products for one image."""
        dim = self.norm1.weight.numel()
        return tokens * (4 * dim**2 + 2 * tokens * dim) + self.mlp.flops(tokens)


class ConvStem(nn.Module):
    """LV-ViT's patch embedding: three convolutions with batch norm, then 8x8 patches of stride 2.

    Images (B, in_chans, H, W) become tokens (B, H * W / 256, dim), row by row.

    Args:
        img_size: in pixels; a multiple of 16.
        in_chans: of the images.
        dim: width of the tokens.
        width: channels of the three convolutions; default 64.
    """

    def __init__(
        self, img_size: int | tuple[int, int], in_chans: int, dim: int, width: int = 64
    ) -> None:
        super().__init__()
        self.img_size, self.grid_size = to_2tuple(img_size), patch_grid(img_size, 16)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)

    def flops(self) -> int:
        """Multiply-adds of the convolutions for one image."""
        pixels = self.img_size[0] * self.img_size[1] // 4
        kernels = sum(c.weight.numel() for c in (self.conv1, self.conv2, self.conv3))
        return pixels * kernels + self.grid_size[0] * self.grid_size[1] * self.proj.weight.numel()
