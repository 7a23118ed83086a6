"""DynamicViT of Swin (arXiv 2207.01580). `maps.py` describes the two paths.

Attention runs at all positions. The paths differ in the MLP alone. Parameters and their names follow
the authors' code, so their checkpoints load (`mesa_train.models.dynamicvit.load_official`), and so
do those of Swin's authors.

| | parameters |
|---|---|
| dynamicvit_swin_t | 29.8 M |
| dynamicvit_swin_s | 52.7 M |
| dynamicvit_swin_b | 93.3 M |

`predictors=()` builds Swin alone, which is the teacher of the distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from mesa_train.models.common.classifier import check_fixed_size, default_cfg, init_linear
from mesa_train.models.common.swin import add_stages, in_windows, shift_mask
from mesa_train.models.lit.pyramid import Mlp

from .maps import SparseMapNet, by_position, mixed
from .predictor import Predictor

Grid = tuple[int, int]


class FastMlp(nn.Module):
    """The fast path: layer norm and one Linear, of (..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)


class SwinBlock(nn.Module):
    """A pre-norm block of maps (B, H, W, dim).

    Args:
        dim: width.
        num_heads: heads of the attention.
        grid: (H, W).
        window: sides of a window.
        shift: of the windows; 0 for none.
        mlp_ratio: of the MLP's hidden width to `dim`.
        drop_path: rate of every branch.
        fast: whether the block has a fast path.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        window: Grid,
        shift: int,
        mlp_ratio: float,
        drop_path: float,
        fast: bool,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size=window)
        # In timm the index is no part of a state dict; in the authors' files it is.
        index = self.attn.relative_position_index
        self.attn.register_buffer("relative_position_index", index)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio, depthwise=False)
        if fast:
            self.fastmlp = FastMlp(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_buffer("attn_mask", shift_mask(grid, window, shift) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mixed(self, x: Tensor, slow: Tensor, fast: Tensor) -> Tensor:
        """Run the MLP at positions (B, k), and the fast path at the others (B, N - k)."""
        x = self.attend(x)
        out = by_position(
            x.flatten(1, 2), slow, fast, lambda t: self.mlp(self.norm2(t)), self.fastmlp
        )
        return x + self.drop_path(out.view_as(x))

    def streams(self, slow: Tensor, fast: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams (B, H, W, dim), mixed by decisions (B, H, W, 1)."""
        x = self.attend(mixed(slow, fast, mask))
        slow_out = x + self.drop_path(self.mlp(self.norm2(mixed(x, slow, mask))))
        return slow_out, x + self.drop_path(self.fastmlp(mixed(fast, x, mask)))

    def flops(self, positions: int, slow: int | None = None) -> int:
        """Multiply-adds of a map of `positions`, of which `slow` (default: all) are slow."""
        dim = self.norm1.weight.numel()
        slow = positions if slow is None else slow
        tokens = self.window[0] * self.window[1]
        attention = positions * (4 * dim**2 + 2 * tokens * dim)
        return attention + self.mlp.flops(slow) + (positions - slow) * dim**2

    def attend(self, x: Tensor) -> Tensor:
        """x plus the attention in its windows."""
        mask = self.attn_mask
        out = in_windows(
            self.norm1(x), self.window, self.shift, lambda windows: self.attn(windows, mask)
        )
        return x + self.drop_path(out)


class DynamicSwin(SparseMapNet):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        keep_rate: share of slow positions after the first predictor; default 0.7.
        predictors: blocks of the third stage, from 0, that a predictor precedes; () for none.
        img_size: in pixels; default 224; every map must be a multiple of its window.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        embed_dim: width of the first stage; default 96.
        depths: blocks, of 4 stages.
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
        keep_rate: float = 0.7,
        predictors: Sequence[int] = (1, 2, 3),
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
        if len(depths) != 4:
            raise ValueError(f"DynamicSwin: depths must have 4 entries, got {depths}")
        first = min(predictors, default=depths[2])

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
            fast = stage == 2 and i >= first
            return SwinBlock(dim, heads, grid, window, shift, mlp_ratio, rate, fast)

        add_stages(
            self,
            "DynamicSwin",
            block,
            img_size=img_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
        )
        self.set_predictors(keep_rate, predictors, depths[2], self.grids[2][0] * self.grids[2][1])
        if self.predictors:
            self.layers[2].score_predictor = nn.ModuleList(
                Predictor(self.widths[2]) for _ in self.predictors
            )
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def enter(self, images: Tensor) -> Tensor:
        """The map (B, H / 16, W / 16, C) before the third stage's blocks."""
        check_fixed_size("DynamicSwin", images, self.img_size)
        x = self.patch_embed(images)
        for stage in self.layers[:2]:
            for block in stage.blocks:
                x = block(x)
            x = stage.merge(x)
        return x

    def outer_flops(self) -> int:
        """Multiply-adds outside of the third stage's blocks and predictors, for one image."""
        first = self.grids[0][0] * self.grids[0][1]
        total = first * self.patch_embed.proj.weight.numel() + self.num_features * self.num_classes
        for stage, (rows, columns) in enumerate(self.grids):
            layer = self.layers[stage]
            if layer.downsample is not None:
                total += rows * columns // 4 * layer.downsample.reduction.weight.numel()
            if stage != 2:
                total += sum(block.flops(rows * columns) for block in layer.blocks)
        return total

    def leave(self, x: Tensor) -> Tensor:
        """The normalised map of the fourth stage."""
        x = self.layers[2].merge(x)
        for block in self.layers[3].blocks:
            x = block(x)
        return self.norm(x)

    def normalized(self, features: Tensor) -> Tensor:
        """The features, which are normalised already."""
        return features

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all positions."""
        return x.mean((1, 2))

    @property
    def sparse_blocks(self) -> nn.ModuleList:
        """The blocks of the third stage."""
        return self.layers[2].blocks

    @property
    def scorers(self) -> nn.ModuleList:
        """The predictors."""
        return self.layers[2].score_predictor

    def no_weight_decay(self) -> set[str]:
        """The tables of relative position biases."""
        return {n for n, _ in self.named_parameters() if n.endswith("position_bias_table")}


_DEEP = {"depths": (2, 2, 18, 2), "predictors": (2, 4, 6)}
VARIANTS: dict[str, dict[str, Any]] = {
    "dynamicvit_swin_t": {},
    "dynamicvit_swin_s": _DEEP,
    "dynamicvit_swin_b": {**_DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32)},
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(fixed_input_size=True, crop_pct=0.9) for name in VARIANTS}
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm. `predictors=()` leaves the backbone."""
    return build_model_with_cfg(DynamicSwin, variant, pretrained, **VARIANTS[variant] | options)


@register_model
def dynamicvit_swin_t(pretrained: bool = False, **options: Any) -> DynamicSwin:
    """DynamicViT of Swin-T. Its authors train it with drop_path_rate=0.2."""
    return _create("dynamicvit_swin_t", pretrained, **options)


@register_model
def dynamicvit_swin_s(pretrained: bool = False, **options: Any) -> DynamicSwin:
    """DynamicViT of Swin-S. Its authors train it with drop_path_rate=0.2."""
    return _create("dynamicvit_swin_s", pretrained, **options)


@register_model
def dynamicvit_swin_b(pretrained: bool = False, **options: Any) -> DynamicSwin:
    """DynamicViT of Swin-B. Its authors train it with drop_path_rate=0.5."""
    return _create("dynamicvit_swin_b", pretrained, **options)
