"""SPViT of DeiT (arXiv 2111.11802): the search network, a found network, and its folded form.

By default a model is the network that its authors published. Parameters and their names follow
their code. A DeiT checkpoint loads too (`mesa_train.models.spvit.load_official`); prune its hidden
units with `network.pruned_weights` first.

| | published: parameters | folded | multiply-adds | search: parameters |
|---|---|---|---|---|
| spvit_deit_ti | 4.87 M | 4.77 M | 1.04 G | 5.73 M |
| spvit_deit_s | 16.12 M | 15.87 M | 3.35 G | 22.07 M |
| spvit_deit_b | 46.21 M | 41.58 M | 8.39 G | 86.61 M |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mesa_train.models.common.classifier import (
    check_fixed_size,
    default_cfg,
    drop_path_rates,
    init_linear,
)
from mesa_train.models.common.vit import TokenEmbed, resized_positions

from .layers import ATTENTION, CONV1, CONV3, Grid, HeadMixing, make_layer
from .network import BlockCost, SPViT, checked
from .search import Mlp, SearchAttention, SearchMlp

MIXING = HeadMixing(alpha=1e-2, columns=tuple(range(9)))
EPS = 1e-6


class DeiTBlock(nn.Module):
    """A pre-norm block of tokens (B, 1 + N, dim), the class token first.

    Args:
        dim: width.
        attn: in the place of attention.
        mlp: the MLP.
        drop_path: rate of both branches.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, kernels: Tensor | None = None, units: Tensor | None = None
    ) -> Tensor:
        u = self.norm1(x)
        out = self.attn(u) if kernels is None else self.attn(u, uniform=kernels)
        x = x + self.drop_path(out)
        u = self.norm2(x)
        return x + self.drop_path(self.mlp(u) if units is None else self.mlp(u, units))


class SPViTDeiT(SPViT):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        search: build the search network; default false.
        msa: of each block, which of [1x1, 3x3, attention] are on: [1, 1, 1], [1, 1, 0], [1, 0, 0]
            or [0, 0, 0]; default: attention everywhere.
        ffn_keep: of each block, the number of hidden units; default: all.
        folded: with plain convolutions, as after `fold`; default false.
        img_size: in pixels; default 224; fixed by the position embeddings.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "token" (default) or "".
        embed_dim: width; default 192.
        depth: blocks; default 12.
        num_heads: default 3; must divide `embed_dim`.
        mlp_ratio: default 4.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    pools = ("token", "")

    def __init__(
        self,
        search: bool = False,
        msa: Sequence[Sequence[int]] | None = None,
        ffn_keep: Sequence[int] | None = None,
        folded: bool = False,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        if search and (msa is not None or ffn_keep is not None or folded):
            raise ValueError("search=True finds msa and ffn_keep; give neither them nor folded")
        hidden = int(embed_dim * mlp_ratio)
        self.search = search
        self.kinds, self.kept = checked("SPViTDeiT", msa, ffn_keep, [hidden] * depth)
        self.img_size = to_2tuple(img_size)
        self.num_features, self.num_heads = embed_dim, num_heads
        self.patch_embed = TokenEmbed(img_size, 16, in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], embed_dim))
        for embedding in (self.cls_token, self.pos_embed):
            trunc_normal_(embedding, std=0.02)

        def block(index: int, rate: float) -> DeiTBlock:
            if search:
                attn: nn.Module = SearchAttention(embed_dim, num_heads, MIXING, grid)
                return DeiTBlock(embed_dim, attn, SearchMlp(embed_dim, hidden), rate)
            attn = make_layer(
                self.kinds[index], embed_dim, num_heads, MIXING, grid=grid, folded=folded
            )
            return DeiTBlock(embed_dim, attn, Mlp(embed_dim, self.kept[index]), rate)

        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(block(index, rate) for index, rate in enumerate(rates))
        self.norm: nn.Module = nn.LayerNorm(embed_dim, EPS)
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def forward_features(self, images: Tensor, uniforms: Sequence[Tensor] | None = None) -> Tensor:
        """Normalised tokens (B, 1 + N, embed_dim), the class token first."""
        check_fixed_size("SPViTDeiT", images, self.img_size)
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x, self.block_uniforms(uniforms, index))
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The class token."""
        return x[:, 0]

    def no_weight_decay(self) -> set[str]:
        """The class token and the position embeddings."""
        return {"cls_token", "pos_embed"}

    def all_blocks(self) -> list[Any]:
        """The blocks in order."""
        return list(self.blocks)

    def block_costs(self) -> list[BlockCost]:
        """The cost of each block, counted as in the authors' code."""
        rows, columns = self.patch_embed.grid_size
        patches, dim = rows * columns, self.num_features
        mixed = dim * (dim // self.num_heads) * patches
        full = 4 * (patches + 1) * dim**2 + 2 * dim * (patches + 1) ** 2
        cost = BlockCost((2 * mixed, 10 * mixed, full), 2 * patches * dim, 2 * dim * (patches + 1))
        return [cost] * len(self.blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding and the head."""
        rows, columns = self.patch_embed.grid_size
        patches = rows * columns * self.patch_embed.proj.weight.numel()
        return patches + self.num_features * self.num_classes

    def adapt_checkpoint(self, weights: Any) -> dict[str, Tensor]:
        """Weights of a DeiT or of this network, for this network and image size."""
        adapted = super().adapt_checkpoint(weights)
        if "pos_embed" in adapted:
            grid: Grid = self.patch_embed.grid_size
            adapted["pos_embed"] = resized_positions(adapted["pos_embed"], grid, 1)
        return adapted


def _published(ones: int, threes: int, keep: Sequence[int]) -> dict[str, Any]:
    """A network whose first layers are 1x1, and whose next layers are 3x3 convolutions."""
    kinds = [CONV1] * ones + [CONV3] * threes
    return {"msa": kinds + [ATTENTION] * (len(keep) - len(kinds)), "ffn_keep": tuple(keep)}


_TI_KEEP = (744, 758, 764, 767, 766, 764, 756, 659, 633, 473, 179, 145)
_S_KEEP = (1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103)
_B_KEEP = (1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190)
_SIZES: dict[str, dict[str, Any]] = {
    "spvit_deit_ti": {},
    "spvit_deit_s": {"embed_dim": 384, "num_heads": 6},
    "spvit_deit_b": {"embed_dim": 768, "num_heads": 12},
}
# Searched for 1.0, 3.2 and 6.0 G multiply-adds.
PUBLISHED = {
    "spvit_deit_ti": _published(2, 0, _TI_KEEP),
    "spvit_deit_s": _published(1, 0, _S_KEEP),
    "spvit_deit_b": _published(3, 2, _B_KEEP),
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(pool_size=None, fixed_input_size=True) for name in _SIZES}
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm: published, unless the options name another architecture."""
    given = {"search", "msa", "ffn_keep", "depth", "embed_dim", "mlp_ratio"} & set(options)
    architecture = {} if given else PUBLISHED[variant]
    return build_model_with_cfg(
        SPViTDeiT, variant, pretrained, **_SIZES[variant] | architecture | options
    )


@register_model
def spvit_deit_ti(pretrained: bool = False, **options: Any) -> SPViTDeiT:
    """SPViT of DeiT-Ti. Its authors train it with drop_path_rate=0.1."""
    return _create("spvit_deit_ti", pretrained, **options)


@register_model
def spvit_deit_s(pretrained: bool = False, **options: Any) -> SPViTDeiT:
    """SPViT of DeiT-S. Its authors train it with drop_path_rate=0.1."""
    return _create("spvit_deit_s", pretrained, **options)


@register_model
def spvit_deit_b(pretrained: bool = False, **options: Any) -> SPViTDeiT:
    """SPViT of DeiT-B. Its authors train it with drop_path_rate=0.1."""
    return _create("spvit_deit_b", pretrained, **options)
