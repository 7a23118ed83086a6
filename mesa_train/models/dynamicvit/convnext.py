"""DynamicViT of ConvNeXt (arXiv 2207.01580). `maps.py` describes the two paths.

Parameters and their names follow the authors' code, so their checkpoints load
(`mesa_train.models.dynamicvit.load_official`), and so do those of ConvNeXt's authors.

| | parameters |
|---|---|
| dynamicvit_convnext_t | 30.5 M |
| dynamicvit_convnext_s | 54.5 M |
| dynamicvit_convnext_b | 96.2 M |

`predictors=()` builds ConvNeXt alone, which is the teacher of the distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mesa_train.models.common.classifier import check_fixed_size, default_cfg, drop_path_rates

from .maps import SparseMapNet, by_position, mixed
from .predictor import Predictor

EPS = 1e-6


class Stem(nn.Sequential):
    """Images to a normalised map (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4), nn.LayerNorm(dim, EPS))

    def forward(self, images: Tensor) -> Tensor:
        return self[1](self[0](images).permute(0, 2, 3, 1))


class Downsample(nn.Sequential):
    """A map (B, H, W, dim) to (B, H / 2, W / 2, out_dim)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(dim, EPS), nn.Conv2d(dim, out_dim, 2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvNeXtBlock(nn.Module):
    """A block of maps (B, H, W, dim).

    Args:
        dim: width.
        drop_path: rate of every branch.
        fast: whether the block has a fast path.
        init_value: of the layer scales.
    """

    def __init__(self, dim: int, drop_path: float, fast: bool, init_value: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))
        if fast:
            self.fast_path_gamma = nn.Parameter(torch.full((dim,), init_value))
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        if fast:
            self.fast_path = nn.Sequential(nn.LayerNorm(dim, EPS), nn.Linear(dim, dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.slow(self.depthwise(x)))

    def mixed(self, x: Tensor, slow: Tensor, fast: Tensor) -> Tensor:
        """Run the slow path at positions (B, k), and the fast path at the others (B, N - k)."""
        tokens = self.depthwise(x).flatten(1, 2)
        out = by_position(tokens, slow, fast, self.slow, self.fast)
        return x + self.drop_path(out.view_as(x))

    def streams(self, slow: Tensor, fast: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams (B, H, W, dim), mixed by decisions (B, H, W, 1)."""
        c = self.depthwise(mixed(slow, fast, mask))
        slow_out = slow + self.drop_path(self.slow(mixed(c, slow, mask)))
        return slow_out, fast + self.drop_path(self.fast(mixed(fast, c, mask)))

    def flops(self, positions: int, slow: int | None = None) -> int:
        """Multiply-adds of a map of `positions`, of which `slow` (default: all) are slow."""
        dim = len(self.gamma)
        slow = positions if slow is None else slow
        return positions * 49 * dim + slow * 8 * dim**2 + (positions - slow) * dim**2

    def depthwise(self, x: Tensor) -> Tensor:
        """The depthwise convolution of a map."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def slow(self, c: Tensor) -> Tensor:
        """The slow path after the convolution, of (..., dim)."""
        return self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(c))))

    def fast(self, c: Tensor) -> Tensor:
        """The fast path after the convolution, of (..., dim)."""
        return self.fast_path_gamma * self.fast_path(c)


class DynamicConvNeXt(SparseMapNet):
    """Image classifier; a timm model.

    Args:
        keep_rate: share of slow positions after the first predictor; default 0.7.
        predictors: blocks of the third stage, from 0, that a predictor precedes; () for none.
        img_size: in pixels; default 224; it fixes the number of slow positions.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        widths: channels, per stage.
        depths: blocks, per stage.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        predictors: Sequence[int] = (1, 2, 3),
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or len(depths) != 4:
            raise ValueError(
                f"DynamicConvNeXt: widths and depths must have 4 entries, got {widths} and {depths}"
            )
        self.img_size = to_2tuple(img_size)
        positions = (self.img_size[0] // 16) * (self.img_size[1] // 16)
        self.set_predictors(keep_rate, predictors, depths[2], positions)
        self.num_features = widths[-1]
        layers: list[nn.Module] = [Stem(in_chans, widths[0])]
        layers += [Downsample(widths[stage], widths[stage + 1]) for stage in range(3)]
        self.downsample_layers = nn.ModuleList(layers)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        first = self.predictors[0] if self.predictors else depths[2]
        self.stages: Any = nn.ModuleList(
            nn.ModuleList(
                ConvNeXtBlock(dim, next(rates), fast=stage == 2 and index >= first)
                for index in range(depths[stage])
            )
            for stage, dim in enumerate(widths)
        )
        self.norm: nn.Module = nn.LayerNorm(widths[-1], EPS)
        self.set_head(num_classes, global_pool, drop_rate)
        self.score_predictor = nn.ModuleList(
            Predictor(widths[2], EPS, pointwise=True) for _ in self.predictors
        )
        self.apply(_init)

    def enter(self, images: Tensor) -> Tensor:
        """The map (B, H / 16, W / 16, C) before the third stage's blocks."""
        check_fixed_size("DynamicConvNeXt", images, self.img_size)
        x = images
        for stage in range(2):
            x = self.downsample_layers[stage](x)
            for block in self.stages[stage]:
                x = block(x)
        return self.downsample_layers[2](x)

    def outer_flops(self) -> int:
        """Multiply-adds outside of the third stage's blocks and predictors, for one image."""
        total = self.num_features * self.num_classes
        for stage, layer in enumerate(self.downsample_layers):
            side = 4 * 2**stage
            positions = (self.img_size[0] // side) * (self.img_size[1] // side)
            total += sum(positions * p.numel() for p in layer.parameters() if p.dim() == 4)
            if stage != 2:
                total += sum(block.flops(positions) for block in self.stages[stage])
        return total

    def leave(self, x: Tensor) -> Tensor:
        """The map of the fourth stage, not normalised."""
        x = self.downsample_layers[3](x)
        for block in self.stages[3]:
            x = block(x)
        return x

    def normalized(self, features: Tensor) -> Tensor:
        """The normalised features of every position."""
        return self.norm(features)

    def pooled(self, x: Tensor) -> Tensor:
        """The normalised mean over all positions."""
        return self.norm(x.mean((1, 2)))

    @property
    def sparse_blocks(self) -> nn.ModuleList:
        """The blocks of the third stage."""
        return self.stages[2]

    @property
    def scorers(self) -> nn.ModuleList:
        """The predictors."""
        return self.score_predictor

    def no_weight_decay(self) -> set[str]:
        """Matrices without weight decay: none."""
        return set()


def _init(module: nn.Module) -> None:
    """Initialise Linears and convolutions: truncated normal weights, biases of zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_DEEP = {"depths": (3, 3, 27, 3), "predictors": (3, 6, 9)}
VARIANTS: dict[str, dict[str, Any]] = {
    "dynamicvit_convnext_t": {},
    "dynamicvit_convnext_s": _DEEP,
    "dynamicvit_convnext_b": {**_DEEP, "widths": (128, 256, 512, 1024)},
}
default_cfgs = generate_default_cfgs(
    {
        name: default_cfg(first_conv="downsample_layers.0.0", fixed_input_size=True)
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm. `predictors=()` leaves the backbone."""
    return build_model_with_cfg(DynamicConvNeXt, variant, pretrained, **VARIANTS[variant] | options)


@register_model
def dynamicvit_convnext_t(pretrained: bool = False, **options: Any) -> DynamicConvNeXt:
    """DynamicViT of ConvNeXt-T. Its authors train it with drop_path_rate=0.2."""
    return _create("dynamicvit_convnext_t", pretrained, **options)


@register_model
def dynamicvit_convnext_s(pretrained: bool = False, **options: Any) -> DynamicConvNeXt:
    """DynamicViT of ConvNeXt-S. Its authors train it with drop_path_rate=0.2."""
    return _create("dynamicvit_convnext_s", pretrained, **options)


@register_model
def dynamicvit_convnext_b(pretrained: bool = False, **options: Any) -> DynamicConvNeXt:
    """DynamicViT of ConvNeXt-B. Its authors train it with drop_path_rate=0.5."""
    return _create("dynamicvit_convnext_b", pretrained, **options)
