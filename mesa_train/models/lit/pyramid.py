"""Base of LITv2 and LIT: four stages of token maps at strides 4, 8, 16 and 32.

All maps are (B, H, W, C). A `Pyramid` is a timm model: `forward_features`, `forward_head`,
`reset_classifier`, `features_only=True` and the rest behave as in timm's own models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from timm.models import build_model_with_cfg
from timm.models._features import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .classifier import (
    Classifier,
    check_image_size,
    drop_path_rates,
    in_format,
    init_linear,
    map_format,
)
from .deformable_merging import DeformableMerging

# From (stage from 0, width, map size for `img_size`, drop path rate) to a block of (B, H, W, C).
MakeBlock = Callable[[int, int, tuple[int, int], float], nn.Module]


class PatchEmbed(nn.Module):
    """Embed images (B, in_chans, H, W), padded to multiples of 4, as (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        bottom, right = -images.shape[2] % 4, -images.shape[3] % 4
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self.proj(images).permute(0, 2, 3, 1)
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # the meta device has no autocast
            # Autocast runs layer norm in float32 on CUDA, but not on a CPU. Without this cast, the
            # residual stream would be float32 on CUDA and bfloat16 on a CPU.
            x = x.float()
        return self.norm(x)


class Mlp(nn.Module):
    """Linear, GELU, Linear. With `depthwise`, a 3x3 depthwise convolution precedes GELU."""

    def __init__(self, dim: int, ratio: float = 4.0, *, depthwise: bool) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        if depthwise:
            self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.depthwise = depthwise

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.depthwise:
            x = self.dwconv(x)
        return self.fc2(F.gelu(x))

    def flops(self, tokens: int) -> int:
        """Multiply-adds. Of the biases only the convolution's count, as in the authors' code."""
        hidden, dim = self.fc1.weight.shape
        return tokens * (2 * dim * hidden + (10 * hidden if self.depthwise else 0))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution of a map (B, H, W, C), to the same shape."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        # The authors divide fan-out by the groups: 9 in every stage.
        nn.init.normal_(self.dwconv.weight, std=(2 / 9) ** 0.5)
        assert self.dwconv.bias is not None
        nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The permuted map has the channels-last layout, so neither permutation copies.
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + drop(attn(norm1(x))), which is left out without attn, then x + drop(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp: nn.Module,
        drop_path: float,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if attn is not None:
            self.norm1 = nn.LayerNorm(dim, eps)
            self.attn: Any = attn
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp: Any = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.attends = attn is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.attends:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds for one map."""
        tokens, dim = height * width, self.norm2.weight.numel()
        attention = self.attn.flops(height, width) + tokens * dim if self.attends else 0
        return attention + tokens * dim + self.mlp.flops(tokens)


class Stage(nn.Module):
    """The blocks of a stage and the merging after them. The last stage has no merging."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.run_blocks(x)
        return x if self.downsample is None else self.downsample(x)

    def run_blocks(self, x: Tensor) -> Tensor:
        """The map of the stage before merging."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Pyramid(Classifier):
    """Image classifier of `len(depths)` stages. The width doubles with each stage.

    Args:
        make_block: builds a block.
        img_size: intended image size, an int or (height, width); default 224. Only `flops` and some
            subclasses depend on it.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        width: channels of the first stage; default 96.
        depths: blocks, per stage.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    """

    output_fmt = "NHWC"
    # True for models that refuse images of another size than `img_size`.
    one_size = False
    # From (width, next width) to the merging after a stage. Subclasses may replace it.
    merging: Callable[[int, int], Any] = DeformableMerging

    def __init__(
        self,
        make_block: MakeBlock,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        check_image_size(type(self).__name__, *self.img_size)
        self.widths = [width * 2**stage for stage in range(len(depths))]
        self.num_features = self.widths[-1]
        self.patch_embed = PatchEmbed(in_chans, width)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        height, columns = (-(-side // 4) for side in self.img_size)
        last = len(depths) - 1
        stages = []
        for stage, depth in enumerate(depths):
            dim, grid = self.widths[stage], (height // 2**stage, columns // 2**stage)
            blocks = [make_block(stage, dim, grid, next(rates)) for _ in range(depth)]
            stages.append(Stage(blocks, self.merging(dim, 2 * dim) if stage < last else None))
        self.layers: Any = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"layers.{stage}"}
            for stage, dim in enumerate(self.widths)
        ]
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The number of stages."""
        return len(self.layers)

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised map of the last stage (B, H / 32, W / 32, num_features)."""
        check_image_size(type(self).__name__, *images.shape[2:])
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage before merging."""
        check_image_size(type(self).__name__, *images.shape[2:])
        return unmerged(self.patch_embed, self.layers, images)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all tokens."""
        return x.mean((1, 2))

    def drop_stages(self, count: int) -> None:
        """Remove all stages after the first `count`."""
        self.layers = self.layers[:count]
        self.layers[-1].downsample = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Matrices without weight decay: none. Optimizers exempt parameters of one dim."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's interface for layer-wise learning rates."""
        blocks = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.(?:blocks\.(\d+)|downsample)"
        ends = [(blocks, None if coarse else (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": ends}

    def flops(
        self, img_size: int | tuple[int, int] | None = None, *, corrected: bool = False
    ) -> int:
        """Multiply-adds of one image, counted as in the authors' code.

        The authors' count has two errors. It counts 12 offset channels instead of 8. It counts the
        tokens of the final norm as stage 1's over 16 instead of over 64.

        Args:
            img_size: in pixels; default: the model's own.
            corrected: count without the two errors; default false.
        """
        height, width = (-(-side // 4) for side in to_2tuple(img_size or self.img_size))
        first = height * width
        kernel = self.patch_embed.proj.weight[0].numel()
        total = first * self.widths[0] * (kernel + 1)
        for stage in self.layers:
            total += sum(block.flops(height, width) for block in stage.blocks)
            if stage.downsample is not None:
                total += stage.downsample.flops(height, width, offsets=8 if corrected else 12)
                height, width = height // 2, width // 2
        normed = height * width if corrected else first // 2 ** len(self.layers)
        return total + self.num_features * (normed + self.num_classes)


class PyramidFeatures(nn.Module):
    """A Pyramid as a backbone for dense tasks, as timm's `features_only=True` builds it.

    The map of every chosen stage, before merging, passes a LayerNorm of its own, `norm{i}`. Modules
    and keys match the authors' backbones. Images (B, C, H, W) become maps (B, C_i, H_i, W_i), or
    (B, H_i, W_i, C_i) if output_fmt is "NHWC".

    Args:
        model: the Pyramid, whose modules are used.
        out_indices: the chosen stages; default: all four.
        output_fmt: "NCHW" (default) or "NHWC".
    """

    def __init__(
        self,
        model: Pyramid,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        output_fmt: str = "NCHW",
    ) -> None:
        super().__init__()
        self.output_fmt = map_format(output_fmt)
        out_indices = model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.feature_info = FeatureInfo(model.feature_info, out_indices)
        self.out_indices = out_indices
        # Images of any size; None: not known, and models of one size refuse others.
        self.takes_multiples_of = None if model.one_size else 1
        self.patch_embed = model.patch_embed
        self.layers: Any = model.layers
        for index in out_indices:
            self.add_module(f"norm{index}", nn.LayerNorm(model.widths[index]))

    def forward(self, images: Tensor) -> list[Tensor]:
        check_image_size(type(self).__name__, *images.shape[2:])
        maps = []
        for index, x in enumerate(unmerged(self.patch_embed, self.layers, images)):
            if index in self.out_indices:
                maps.append(in_format(self.get_submodule(f"norm{index}")(x), self.output_fmt))
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        for stage in self.layers:
            stage.grad_checkpointing = enable


def unmerged(patch_embed: nn.Module, stages: Any, images: Tensor) -> Iterator[Tensor]:
    """Yield the map (B, H, W, C) of each stage before merging."""
    x = patch_embed(images)
    for stage in stages:
        x = stage.run_blocks(x)
        yield x
        if stage.downsample is not None:
            x = stage.downsample(x)


def create(cls: type[Pyramid], variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a model through timm. `features_only=True` gives a `PyramidFeatures`."""
    features = {
        "out_indices": (0, 1, 2, 3),
        "feature_cls": PyramidFeatures,
        "output_fmt": "NCHW",
    }
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=features, **options)
