"""HVT (arXiv 2103.10619): a ViT without class token, whose tokens are max-pooled between blocks.

A pooling has kernel 3 and stride 2 along the row-by-row token sequence. It follows a whole block,
and a new position embedding follows it: 196, 97, 48, 23 and 11 tokens. The head reads the mean of
the last tokens. Parameters and their names follow the authors' code, so its checkpoints load
(`mesa_train.models.hvt.load_official`). `load_official` also resamples the position embeddings to
other image sizes.

| | parameters | multiply-adds at 224 | pooling after blocks |
|---|---|---|---|
| hvt_ti_1 | 5.74 M | 0.64 G | 0 |
| hvt_s_0 | 22.05 M | 4.57 G | none |
| hvt_s_1 | 22.09 M | 2.40 G | 0 |
| hvt_s_2 | 22.11 M | 1.94 G | 0, 6 |
| hvt_s_3 | 22.11 M | 1.62 G | 0, 4, 8 |
| hvt_s_4 | 22.12 M | 1.39 G | 0, 3, 6, 9 |

The authors' "Scale-HVT-Ti-4" is hvt_s_4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mesa_train.models.common.classifier import (
    HeadedClassifier,
    check_fixed_size,
    default_cfg,
    drop_path_rates,
    init_linear,
)
from mesa_train.models.common.vit import TokenEmbed, resized_positions
from mesa_train.models.lit.pyramid import Block, Mlp

EPS = 1e-6


class PoolingBlock(Block):
    """A block of tokens (B, T, dim), then max pooling and a position embedding for its output.

    Args:
        dim: width.
        num_heads: heads of the attention.
        mlp_ratio: of the MLP's hidden width to `dim`.
        drop_path: rate of both branches.
        pooled_tokens: tokens after the pooling; 0 for no pooling.
        pool: (kernel, stride) of the pooling.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        pooled_tokens: int,
        pool: tuple[int, int],
    ) -> None:
        attn = Attention(dim, num_heads, qkv_bias=True)
        super().__init__(dim, attn, Mlp(dim, mlp_ratio, depthwise=False), drop_path, EPS)
        self.downsample = nn.MaxPool1d(*pool) if pooled_tokens else None
        if pooled_tokens:
            self.pos_embed = nn.Parameter(torch.empty(1, pooled_tokens, dim))
            trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.downsample is None:
            return x
        return self.downsample(x.transpose(1, 2)).transpose(1, 2) + self.pos_embed

    def flops(self, tokens: int) -> int:  # type: ignore[override]
        """Multiply-adds of the products for one image."""
        dim = self.norm2.weight.numel()
        return tokens * (4 * dim**2 + 2 * tokens * dim) + self.mlp.flops(tokens)


class HVT(HeadedClassifier):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        img_size: in pixels; default 224; fixed by the position embeddings.
        patch_size: in pixels; default 16.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        embed_dim: width; default 384.
        depth: blocks; default 12.
        num_heads: default 6; must divide `embed_dim`.
        mlp_ratio: default 4.
        pool_after: the blocks, from 0, that a pooling follows; default: none.
        pool_kernel: tokens of a window; default 3.
        pool_stride: tokens between windows; default 2.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        pool_after: Sequence[int] = (),
        pool_kernel: int = 3,
        pool_stride: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not set(pool_after) <= set(range(depth)):
            raise ValueError(f"pool_after must be blocks from 0 to {depth - 1}, got {pool_after}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.img_size = to_2tuple(img_size)
        self.num_features = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = TokenEmbed(img_size, patch_size, in_chans, embed_dim)
        rows, columns = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        self.tokens = [rows * columns]  # at the start of each block, and at the end
        blocks = []
        for index, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            before = self.tokens[-1]
            after = (before - pool_kernel) // pool_stride + 1 if index in pool_after else before
            if after < 1:
                raise ValueError(
                    f"pool_after: block {index} has {before} tokens, fewer than the "
                    f"pool_kernel {pool_kernel}"
                )
            self.tokens.append(after)
            pooled = after if index in pool_after else 0
            pool = (pool_kernel, pool_stride)
            blocks.append(PoolingBlock(embed_dim, num_heads, mlp_ratio, rate, pooled, pool))
        self.blocks = nn.ModuleList(blocks)
        self.norm: nn.Module = nn.LayerNorm(embed_dim, EPS)
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, T, embed_dim) after the last block."""
        check_fixed_size("HVT", images, self.img_size)
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all tokens."""
        return x.mean(1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """All position embeddings, those of the blocks included."""
        return {name for name, _ in self.named_parameters() if "pos_embed" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """timm's interface for layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def flops(self) -> int:
        """Multiply-adds of the products for one image of `img_size`."""
        total = self.tokens[0] * self.patch_embed.proj.weight.numel()
        for block, tokens in zip(self.blocks, self.tokens, strict=False):
            total += block.flops(tokens)  # type: ignore[operator]
        return total + self.num_features * self.num_classes

    def adapt_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights for this image size, with resampled position embeddings.

        The first embedding has a grid. The embeddings after a pooling do not, so they are
        interpolated along the sequence.
        """
        adapted, own = dict(weights), self.state_dict()
        if "pos_embed" in adapted and adapted["pos_embed"].dim() == 3:
            grid = self.patch_embed.grid_size
            adapted["pos_embed"] = resized_positions(adapted["pos_embed"], grid, 0)
        for key, value in adapted.items():
            if key.startswith("blocks.") and key.endswith(".pos_embed") and key in own:
                tokens = own[key].shape[1]
                if value.shape[1] != tokens:
                    lines = value.transpose(1, 2).float()
                    lines = F.interpolate(lines, tokens, mode="linear", align_corners=False)
                    adapted[key] = lines.transpose(1, 2).to(value.dtype)
        return adapted


_S = {"embed_dim": 384, "num_heads": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "hvt_ti_1": {"embed_dim": 192, "num_heads": 3, "pool_after": (0,)},
    "hvt_s_0": _S,
    "hvt_s_1": {**_S, "pool_after": (0,)},
    "hvt_s_2": {**_S, "pool_after": (0, 6)},
    "hvt_s_3": {**_S, "pool_after": (0, 4, 8)},
    "hvt_s_4": {**_S, "pool_after": (0, 3, 6, 9)},
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(pool_size=None, fixed_input_size=True) for name in VARIANTS}
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm."""
    return build_model_with_cfg(HVT, variant, pretrained, **VARIANTS[variant] | options)


@register_model
def hvt_ti_1(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-Ti-1. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_ti_1", pretrained, **options)


@register_model
def hvt_s_0(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-S-0: no pooling. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_s_0", pretrained, **options)


@register_model
def hvt_s_1(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-S-1. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_s_1", pretrained, **options)


@register_model
def hvt_s_2(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-S-2. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_s_2", pretrained, **options)


@register_model
def hvt_s_3(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-S-3. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_s_3", pretrained, **options)


@register_model
def hvt_s_4(pretrained: bool = False, **options: Any) -> HVT:
    """HVT-S-4, also called Scale-HVT-Ti-4. Its authors train it with drop_path_rate=0.1."""
    return _create("hvt_s_4", pretrained, **options)
