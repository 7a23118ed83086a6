"""LIT (arXiv 2105.14217), LITv2's predecessor: only MLPs in early stages, full attention later.

`lit_s`, `lit_m` and `lit_b` have a table of relative position biases in stages 3 and 4. The size of
the table fixes the size of the images: set `img_size` when the model is built. `lit_ti` (`LITTi`)
has learned absolute positions and a class token. Parameters and their names follow the authors'
code.

With `dynamic_img_size=True`, as in the authors' detectors and segmenters, images may have any size:
the tables and positions of `img_size` are resized in every forward.

| | parameters | multiply-adds at 224 |
|---|---|---|
| lit_ti | 19.9 M | |
| lit_s | 28.0 M | 4.08 G |
| lit_m | 49.4 M | 8.60 G |
| lit_b | 87.3 M | 15.04 G |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table_simple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .classifier import check_stages, default_cfg
from .lit_ti import LITTi, resize_positions
from .pyramid import Block, Mlp, Pyramid, create

_BIAS, _INDEX = "relative_position_bias_table", "relative_position_index"


class RelativeAttention(nn.Module):
    """Attention of a map (B, H, W, dim) of one size with learned relative position biases.

    There is one bias for each distance and head.

    Args:
        dim: width.
        num_heads: number of heads.
        resolution: (H, W) of the map.
        resized: resize the table bicubically for maps of other sizes, in every forward; default
            false: other sizes are refused.
    """

    relative_position_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, resolution: tuple[int, int], resized: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.resolution = dim, num_heads, resolution
        self.resized = resized
        height, width = resolution
        table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer(_INDEX, _distances(height, width))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        if (height, width) != self.resolution and not self.resized:
            raise ValueError(
                f"this LIT takes maps of {self.resolution[0]}x{self.resolution[1]} here, got "
                f"{height}x{width}; set img_size or dynamic_img_size=True when the model is built"
            )
        tokens = height * width
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if (height, width) == self.resolution:
            bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
            bias = bias.view(tokens, tokens, self.num_heads).permute(2, 0, 1).unsqueeze(0)
        else:
            bias = self._resized_bias(height, width)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, self.dim))

    def _resized_bias(self, height: int, width: int) -> Tensor:
        """Biases (1, heads, tokens, tokens) of a map of another size.

        The table is resized to (2 height - 1, 2 width - 1). The windows of its mirror image, from
        the last to the first, are the rows of the biases, so no index is saved for the backward.
        """
        rows, columns = (2 * side - 1 for side in self.resolution)
        table = self.relative_position_bias_table.view(rows, columns, self.num_heads)
        maps = table.permute(2, 0, 1).unsqueeze(0)
        maps = F.interpolate(maps, (2 * height - 1, 2 * width - 1), mode="bicubic")
        windows = maps[0].flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
        return windows.reshape(1, self.num_heads, height * width, height * width)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the matmuls for one map."""
        tokens = height * width
        return tokens * (4 * self.dim**2 + 2 * tokens * self.dim)


class LIT(Pyramid):
    """Image classifier for images of `img_size`, or of any size with `dynamic_img_size`.

    Args:
        depths: blocks, per stage.
        num_heads: heads, per stage.
        attends: whether a stage has attention, per stage.
        mlp_ratio: default 4.
        dynamic_img_size: resize the tables of biases in every forward; default false.
        options: arguments of `Pyramid`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attends: Sequence[bool] = (False, False, True, True),
        mlp_ratio: float = 4.0,
        dynamic_img_size: bool = False,
        **options: Any,
    ) -> None:
        self.one_size = not dynamic_img_size
        check_stages("LIT", depths=depths, num_heads=num_heads, attends=attends)

        def make_block(stage: int, dim: int, grid: tuple[int, int], drop_path: float) -> nn.Module:
            attn = None
            if attends[stage]:
                attn = RelativeAttention(dim, num_heads[stage], grid, dynamic_img_size)
            return Block(dim, attn, Mlp(dim, mlp_ratio, depthwise=False), drop_path)

        super().__init__(make_block, depths=depths, **options)

    def no_weight_decay(self) -> set[str]:
        """The tables of relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(_BIAS)}


def resize_biases(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A LIT checkpoint's weights for the image size of `model`, with interpolated bias tables."""
    model_weights = model.state_dict()
    resized = {}
    for key, value in weights.items():
        if key in model_weights and key.endswith(_INDEX):
            value = model_weights[key]
        elif (
            key in model_weights and key.endswith(_BIAS) and value.shape != model_weights[key].shape
        ):
            attn: Any = model.get_submodule(key.rpartition(".")[0])
            value = resize_rel_pos_bias_table_simple(
                value, attn.resolution, model_weights[key].shape
            )
        resized[key] = value
    return resized


def _distances(height: int, width: int) -> Tensor:
    """(tokens, tokens): the row of the table for the distance between two tokens."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows = y[:, None] - y[None, :] + height - 1
    columns = x[:, None] - x[None, :] + width - 1
    return rows * (2 * width - 1) + columns


default_cfgs = generate_default_cfgs(
    {
        "lit_ti": default_cfg(first_conv="patch_embed1.proj", fixed_input_size=True),
        "lit_s": default_cfg(fixed_input_size=True),
        "lit_m": default_cfg(fixed_input_size=True),
        "lit_b": default_cfg(fixed_input_size=True),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm."""
    return create(LIT, variant, pretrained, pretrained_filter_fn=resize_biases, **options)


@register_model
def lit_ti(pretrained: bool = False, **options: Any) -> LITTi:
    """LIT-Ti. Its authors train it with drop_path_rate=0.1."""
    return build_model_with_cfg(
        LITTi,
        "lit_ti",
        pretrained,
        pretrained_filter_fn=resize_positions,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def lit_s(pretrained: bool = False, **options: Any) -> LIT:
    """LIT-S. Its authors train it with drop_path_rate=0.2."""
    return _create("lit_s", pretrained, **options)


@register_model
def lit_m(pretrained: bool = False, **options: Any) -> LIT:
    """LIT-M. Its authors train it with drop_path_rate=0.3."""
    return _create("lit_m", pretrained, **{"depths": (2, 2, 18, 2)} | options)


@register_model
def lit_b(pretrained: bool = False, **options: Any) -> LIT:
    """LIT-B. Its authors train it with drop_path_rate=0.5 and activation checkpointing."""
    base = {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create("lit_b", pretrained, **base | options)
