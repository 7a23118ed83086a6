"""LITv2 (arXiv 2205.13213): no attention in early stages, HiLo at stride 16, full attention at 32.

Every MLP has a depthwise convolution, which replaces position embeddings. Deformable token merging
connects the stages. Parameters, their names and their initialisation follow the authors' code, so
its checkpoints load (`mesa_train.models.lit.official`). Images may have any size of at least 29
pixels. `features_only=True` builds the authors' backbone for dense tasks.

| | parameters | multiply-adds at 224 |
|---|---|---|
| litv2_s | 27.8 M | 3.73 G |
| litv2_m | 48.8 M | 7.48 G |
| litv2_b | 86.5 M | 13.19 G |

`litv2_tiny` is a small model of this project, for images of 32 to 64 pixels and for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from .classifier import check_stages, default_cfg
from .hilo import HiLo
from .pyramid import Block, Mlp, Pyramid, create


class LITv2(Pyramid):
    """Image classifier.

    Args:
        depths: blocks, per stage.
        num_heads: heads, per stage.
        windows: per stage: 0 for no attention, 1 for plain attention, else HiLo's window.
        alpha: HiLo's share of Lo-Fi heads; default 0.9.
        mlp_ratio: default 4.
        options: arguments of `Pyramid`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        **options: Any,
    ) -> None:
        check_stages("LITv2", depths=depths, num_heads=num_heads, windows=windows)

        def make_block(stage: int, dim: int, _: object, drop_path: float) -> nn.Module:
            window = windows[stage]
            attn = HiLo(dim, num_heads[stage], window, alpha, qkv_bias=True) if window else None
            return Block(dim, attn, Mlp(dim, mlp_ratio, depthwise=True), drop_path)

        super().__init__(make_block, depths=depths, **options)


default_cfgs = generate_default_cfgs(
    {
        "litv2_tiny": default_cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
        "litv2_s": default_cfg(),
        "litv2_m": default_cfg(),
        "litv2_b": default_cfg(),
        "litv2_b_384": default_cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)


@register_model
def litv2_tiny(pretrained: bool = False, **options: Any) -> LITv2:
    """1.2 million parameters. At 32 pixels, stages of at most 4x4 tokens attend with all heads."""
    small = {
        "img_size": 32,
        "width": 32,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "alpha": 0.5,
    }
    return create(LITv2, "litv2_tiny", pretrained, **small | options)


@register_model
def litv2_s(pretrained: bool = False, **options: Any) -> LITv2:
    """LITv2-S. Its authors train it with drop_path_rate=0.2."""
    return create(LITv2, "litv2_s", pretrained, **options)


@register_model
def litv2_m(pretrained: bool = False, **options: Any) -> LITv2:
    """LITv2-M. Its authors train it with drop_path_rate=0.3."""
    return create(LITv2, "litv2_m", pretrained, **{"depths": (2, 2, 18, 2)} | options)


@register_model
def litv2_b(pretrained: bool = False, **options: Any) -> LITv2:
    """LITv2-B. Its authors train it with drop_path_rate=0.5."""
    return create(LITv2, "litv2_b", pretrained, **_B | options)


@register_model
def litv2_b_384(pretrained: bool = False, **options: Any) -> LITv2:
    """LITv2-B for images of 384 pixels, with the same parameters."""
    return create(LITv2, "litv2_b_384", pretrained, **_B | {"img_size": 384} | options)


_B = {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
