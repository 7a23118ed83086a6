"""SPViT of Swin (arXiv 2111.11802): the search network, a found network, and its folded form.

The options are those of `deit.py`. In the search, the convolutions run inside each shifted window
and are padded at its border. In a found network a 3x3 convolution runs on the whole map. The authors
published the architecture of Swin-T. Of Swin-S their layers are known and the hidden units are not,
so `spvit_swin_s` keeps all hidden units by default.

| | published: parameters | folded | multiply-adds |
|---|---|---|---|
| spvit_swin_t | 26.31 M | 26.23 M | 3.33 G |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mesa_train.models.common.classifier import check_fixed_size, default_cfg, init_linear
from mesa_train.models.common.swin import add_stages, in_windows, shift_mask

from .layers import ATTENTION, CONV1, SKIP, Grid, HeadMixing, SplitAttention, make_layer
from .network import BlockCost, SPViT, checked
from .search import Mlp, SearchAttention, SearchMlp

# The authors' order of positions: the centre, then the others column by column.
MIXING = HeadMixing(alpha=1e2, columns=(1, 2, 3, 4, 0, 5, 6, 7, 8))


class SwinBlock(nn.Module):
    """A pre-norm block of maps (B, H, W, dim).

    Args:
        dim: width.
        attn: in the place of attention. `SplitAttention` runs in windows, other layers on the map.
        mlp: the MLP.
        grid: (H, W).
        window: sides of a window.
        shift: of the windows; 0 for none.
        drop_path: rate of both branches.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        grid: Grid,
        window: Grid,
        shift: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_buffer("attn_mask", shift_mask(grid, window, shift) if shift else None)

    def forward(
        self, x: Tensor, kernels: Tensor | None = None, units: Tensor | None = None
    ) -> Tensor:
        u = self.norm1(x)
        if isinstance(self.attn, SplitAttention):
            options = {} if kernels is None else {"uniform": kernels}
            mask = self.attn_mask
            u = in_windows(u, self.window, self.shift, lambda w: self.attn(w, mask, **options))
        else:
            u = self.attn(u)
        x = x + self.drop_path(u)
        u = self.norm2(x)
        return x + self.drop_path(self.mlp(u) if units is None else self.mlp(u, units))


class SPViTSwin(SPViT):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        search: build the search network; default false.
        msa: of each block, in the order of the network, which of [1x1, 3x3, attention] are on:
            [1, 1, 1], [1, 1, 0], [1, 0, 0] or [0, 0, 0]; default: attention everywhere.
        ffn_keep: of each block, the number of hidden units; default: all.
        folded: with plain convolutions, as after `fold`; default false.
        img_size: in pixels; default 224; every map must be a multiple of its window.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        embed_dim: width of the first stage; default 96.
        depths: blocks, per stage.
        num_heads: heads, per stage.
        window_size: side of a window; default 7.
        mlp_ratio: default 4.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    layers: Any
    patch_embed: Any
    img_size: Grid
    grids: list[Grid]
    widths: list[int]

    def __init__(
        self,
        search: bool = False,
        msa: Sequence[Sequence[int]] | None = None,
        ffn_keep: Sequence[int] | None = None,
        folded: bool = False,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if search and (msa is not None or ffn_keep is not None or folded):
            raise ValueError("search=True finds msa and ffn_keep; give neither them nor folded")
        self.search, self.depths, self.num_heads = search, tuple(depths), tuple(num_heads)
        hidden = [
            int(embed_dim * 2**stage * mlp_ratio)
            for stage, depth in enumerate(depths)
            for _ in range(depth)
        ]
        self.kinds, self.kept = checked("SPViTSwin", msa, ffn_keep, hidden)

        def block(
            stage: int,
            i: int,
            dim: int,
            heads: int,
            grid: Grid,
            window: Grid,
            shift: int,
            rate: float,
        ) -> nn.Module:
            index = sum(depths[:stage]) + i
            if search:
                attn: nn.Module = SearchAttention(
                    dim, heads, MIXING, window=window, thresholds="kernel_thresholds_full"
                )
                mlp: nn.Module = SearchMlp(dim, hidden[index])
            else:
                attn = make_layer(
                    self.kinds[index], dim, heads, MIXING, window=window, folded=folded
                )
                mlp = Mlp(dim, self.kept[index])
            return SwinBlock(dim, attn, mlp, grid, window, shift, rate)

        add_stages(
            self,
            "SPViTSwin",
            block,
            img_size=img_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
        )
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def forward_features(self, images: Tensor, uniforms: Sequence[Tensor] | None = None) -> Tensor:
        """The normalised map of the last stage (B, H / 32, W / 32, num_features)."""
        check_fixed_size("SPViTSwin", images, self.img_size)
        x = self.patch_embed(images)
        index = 0
        for stage in self.layers:
            for block in stage.blocks:
                x = self.run_block(block, x, self.block_uniforms(uniforms, index))
                index += 1
            x = stage.merge(x)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all tokens."""
        return x.mean((1, 2))

    def no_weight_decay(self) -> set[str]:
        """The tables of relative position biases."""
        return {n for n, _ in self.named_parameters() if n.endswith("position_bias_table")}

    def all_blocks(self) -> list[Any]:
        """The blocks in order."""
        return [block for stage in self.layers for block in stage.blocks]

    def block_costs(self) -> list[BlockCost]:
        """The cost of each block, counted as in the authors' code."""
        costs = []
        for stage, (rows, columns) in enumerate(self.grids):
            tokens, dim = rows * columns, self.widths[stage]
            mixed = dim * (dim // self.num_heads[stage]) * tokens
            for block in self.layers[stage].blocks:
                window = block.window[0] * block.window[1]
                full = 4 * tokens * dim**2 + 2 * tokens * window * dim
                kinds = (2 * mixed, 10 * mixed, full)
                costs.append(BlockCost(kinds, 2 * tokens * dim, 2 * dim * tokens))
        return costs

    def fixed_cost(self) -> int:
        """Multiply-adds of the embedding, the mergings, the last norm and the head.

        The tokens of the last norm are counted as the first stage's over 16, as in the authors'
        code.
        """
        first = self.grids[0][0] * self.grids[0][1]
        total = first * (self.patch_embed.proj.weight.numel() + self.widths[0])
        for stage in range(len(self.layers) - 1):
            tokens, dim = self.grids[stage][0] * self.grids[stage][1], self.widths[stage]
            total += tokens * dim + tokens // 4 * 4 * dim * 2 * dim
        normed = self.num_features * first // 2 ** len(self.layers)
        return total + normed + self.num_features * self.num_classes


def _layers(depths: Sequence[int], ones: Sequence[Grid], skips: Sequence[Grid]) -> list[Any]:
    """The layers of a network, with convolutions and skips at (stage, block)."""
    places = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [CONV1 if p in ones else SKIP if p in skips else ATTENTION for p in places]


_S_DEPTHS = (2, 2, 18, 2)
_T_KEEP = (186, 152, 646, 504, 1350, 1319, 1289, 1249, 1234, 1082, 3041, 2994)
_SIZES: dict[str, dict[str, Any]] = {"spvit_swin_t": {}, "spvit_swin_s": {"depths": _S_DEPTHS}}
PUBLISHED: dict[str, dict[str, Any]] = {
    "spvit_swin_t": {
        "msa": _layers((2, 2, 6, 2), [(0, 0), (1, 0)], [(0, 1), (1, 1)]),
        "ffn_keep": _T_KEEP,
    },
    "spvit_swin_s": {
        "msa": _layers(_S_DEPTHS, [(0, 0), (2, 13)], [(0, 1), (2, 12), (2, 16), (2, 17)]),
    },
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(fixed_input_size=True, crop_pct=0.9) for name in _SIZES}
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm: published, unless the options name another architecture."""
    given = {"search", "msa", "ffn_keep", "depths", "embed_dim", "mlp_ratio"} & set(options)
    architecture = {} if given else PUBLISHED[variant]
    return build_model_with_cfg(
        SPViTSwin, variant, pretrained, **_SIZES[variant] | architecture | options
    )


@register_model
def spvit_swin_t(pretrained: bool = False, **options: Any) -> SPViTSwin:
    """SPViT of Swin-T. Its authors train it with drop_path_rate=0.2."""
    return _create("spvit_swin_t", pretrained, **options)


@register_model
def spvit_swin_s(pretrained: bool = False, **options: Any) -> SPViTSwin:
    """SPViT of Swin-S. Its authors train it with drop_path_rate=0.3."""
    return _create("spvit_swin_s", pretrained, **options)
