"""EcoFormer in PVTv2 (arXiv 2209.09004): hashed linear attention in stages 1 to 3, softmax in 4.

Call `mesa_train.models.ecoformer.fit_hashes(model, batch)` once before the training; a new model's
hashes are random. `attention="msa"` builds the same network with softmax attention everywhere,
which the authors train first. Parameters and their names follow the authors' code, so its
checkpoints load (`mesa_train.models.ecoformer.load_official`), and so do those of PVTv2. Images may
have any size. For the fit, stage 3 needs 25 tokens.

| | parameters | multiplications, additions at 224 |
|---|---|---|
| ecoformer_pvt_v2_b0 | 3.14 M | 0.53 G, 0.56 G |
| ecoformer_pvt_v2_b1 | 11.89 M | 2.02 G, 2.08 G |
| ecoformer_pvt_v2_b2 | 20.37 M | 3.84 G, 3.95 G |
| ecoformer_pvt_v2_b3 | 34.08 M | 6.52 G, 6.69 G |
| ecoformer_pvt_v2_b4 | 45.67 M | 9.54 G, 9.79 G |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mesa_train.models.common.classifier import default_cfg, drop_path_rates, init_linear
from mesa_train.models.lit.classifier import check_stages

from .backbone import EcoFormer, PatchEmbed, feature_info, make_block, stage_kernels


class EcoFormerPVT(EcoFormer):
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
        mlp_ratios: per stage.
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
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(
            "EcoFormerPVT", widths=widths, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios
        )
        self.img_size, self.widths, self.depth = to_2tuple(img_size), widths, len(depths)
        self.num_features = widths[-1]
        kernels = stage_kernels(attention, kernel, len(depths))
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        before = in_chans
        for stage, dim in enumerate(widths):
            size = (3, 2) if stage else (7, 4)
            self.add_module(f"patch_embed{stage + 1}", PatchEmbed(before, dim, *size))
            blocks = [
                make_block(
                    dim, num_heads[stage], mlp_ratios[stage], next(rates), kernels[stage], True
                )
                for _ in range(depths[stage])
            ]
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, 1e-6))
            before = dim
        self.norm: nn.Module = nn.Identity()  # each stage has its own norm
        self.feature_info = feature_info(widths, "norm", 1)
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        self.apply(_init_conv)

    def embed_of(self, stage: int) -> PatchEmbed:
        """The patch embedding before a stage."""
        return self.get_submodule(f"patch_embed{stage + 1}")  # type: ignore[return-value]

    def blocks_of(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage."""
        return self.get_submodule(f"block{stage + 1}")  # type: ignore[return-value]

    def run_stage(self, stage: int, x: Tensor) -> Tensor:
        """The normalised map of a stage from the map before it."""
        x = self.embed_of(stage)(x)
        for block in self.blocks_of(stage):
            x = self.run_block(block, x)
        return self.get_submodule(f"norm{stage + 1}")(x)

    def drop_stages(self, count: int) -> None:
        """Remove all stages after the first `count`."""
        for stage in range(count, self.depth):
            for name in ("patch_embed", "block", "norm"):
                delattr(self, f"{name}{stage + 1}")
        self.depth = count


def _init_conv(module: nn.Module) -> None:
    """Initialise a convolution by its fan-out, which is divided by the groups; biases of zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "ecoformer_pvt_v2_b0": {"widths": (32, 64, 160, 256)},
    "ecoformer_pvt_v2_b1": {},
    "ecoformer_pvt_v2_b2": {"depths": (3, 4, 6, 3)},
    "ecoformer_pvt_v2_b3": {"depths": (3, 4, 18, 3)},
    "ecoformer_pvt_v2_b4": {"depths": (3, 8, 27, 3)},
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(first_conv="patch_embed1.proj") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm."""
    return build_model_with_cfg(
        EcoFormerPVT,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **VARIANTS[variant] | options,
    )


@register_model
def ecoformer_pvt_v2_b0(pretrained: bool = False, **options: Any) -> EcoFormerPVT:
    """EcoFormer in PVTv2-B0."""
    return _create("ecoformer_pvt_v2_b0", pretrained, **options)


@register_model
def ecoformer_pvt_v2_b1(pretrained: bool = False, **options: Any) -> EcoFormerPVT:
    """EcoFormer in PVTv2-B1."""
    return _create("ecoformer_pvt_v2_b1", pretrained, **options)


@register_model
def ecoformer_pvt_v2_b2(pretrained: bool = False, **options: Any) -> EcoFormerPVT:
    """EcoFormer in PVTv2-B2."""
    return _create("ecoformer_pvt_v2_b2", pretrained, **options)


@register_model
def ecoformer_pvt_v2_b3(pretrained: bool = False, **options: Any) -> EcoFormerPVT:
    """EcoFormer in PVTv2-B3."""
    return _create("ecoformer_pvt_v2_b3", pretrained, **options)


@register_model
def ecoformer_pvt_v2_b4(pretrained: bool = False, **options: Any) -> EcoFormerPVT:
    """EcoFormer in PVTv2-B4."""
    return _create("ecoformer_pvt_v2_b4", pretrained, **options)
