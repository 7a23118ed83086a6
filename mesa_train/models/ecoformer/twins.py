"""EcoFormer in Twins-SVT-S (arXiv 2209.09004): every attention of stages 1 to 3 is hashed.

The windowed attentions of Twins become global. Stage 4 has softmax attention. Options, the fit of
the hashes, names and checkpoints are as in `pvt.py`.

| | parameters |
|---|---|
| ecoformer_twins_svt_s | 21.52 M |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mesa_train.models.common.classifier import default_cfg, drop_path_rates, init_linear
from mesa_train.models.lit.classifier import check_stages

from .backbone import EcoFormer, PatchEmbed, feature_info, make_block, stage_kernels
from .pvt import _init_conv


class PositionEncoding(nn.Module):
    """x plus a 3x3 depthwise convolution of x, for a map (B, H, W, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EcoFormerTwins(EcoFormer):
    """Image classifier; a timm model.

    Args:
        attention: "ecoformer" (default) or "msa", softmax attention in every stage.
        kernel: of the hashed attention: "official" (default) or "consistent" (see `attention.py`).
        img_size: the size that `operations` counts; default 224.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "avg" (default) or "".
        widths: channels, per stage.
        depths: blocks, per stage.
        num_heads: heads, per stage.
        mlp_ratio: default 4.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(
        self,
        attention: str = "ecoformer",
        kernel: str = "official",
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages("EcoFormerTwins", widths=widths, depths=depths, num_heads=num_heads)
        self.img_size, self.widths, self.depth = to_2tuple(img_size), widths, len(depths)
        self.num_features = widths[-1]
        kernels = stage_kernels(attention, kernel, len(depths))
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        befores = (in_chans, *widths)
        self.patch_embeds = nn.ModuleList(
            PatchEmbed(befores[i], dim, *(2, 2) if i else (4, 4)) for i, dim in enumerate(widths)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                make_block(dim, num_heads[i], mlp_ratio, next(rates), kernels[i], False)
                for _ in range(depths[i])
            )
            for i, dim in enumerate(widths)
        )
        self.pos_block = nn.ModuleList(PositionEncoding(dim) for dim in widths)
        self.norm: nn.Module = nn.LayerNorm(widths[-1], 1e-6)
        self.feature_info = feature_info(widths, "blocks.", 0)
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        self.apply(_init_conv)

    def embed_of(self, stage: int) -> PatchEmbed:
        """The patch embedding before a stage."""
        return self.patch_embeds[stage]  # type: ignore[return-value]

    def blocks_of(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage."""
        return self.blocks[stage]  # type: ignore[return-value]

    def parts_of(self, stage: int) -> list[nn.Module]:
        """The modules of a stage that have weights."""
        return [*super().parts_of(stage), self.pos_block[stage]]

    def run_stage(self, stage: int, x: Tensor) -> Tensor:
        """The map of a stage from the map before it."""
        x = self.embed_of(stage)(x)
        for index, block in enumerate(self.blocks_of(stage)):
            x = self.run_block(block, x)
            if index == 0:
                x = self.pos_block[stage](x)
        return x

    def drop_stages(self, count: int) -> None:
        """Remove all stages after the first `count`."""
        for name in ("patch_embeds", "blocks", "pos_block"):
            setattr(self, name, self.get_submodule(name)[:count])  # type: ignore[index]
        self.depth = count


default_cfgs = generate_default_cfgs(
    {"ecoformer_twins_svt_s": default_cfg(first_conv="patch_embeds.0.proj")}
)


@register_model
def ecoformer_twins_svt_s(pretrained: bool = False, **options: Any) -> EcoFormerTwins:
    """EcoFormer in Twins-SVT-S."""
    return build_model_with_cfg(EcoFormerTwins, "ecoformer_twins_svt_s", pretrained, **options)
