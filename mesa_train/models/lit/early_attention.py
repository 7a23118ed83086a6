"""LIT's first experiment: models without attention in their early stages (arXiv 2105.14217).

At high resolution attention costs most and, by the paper's measurement, hardly helps. There are two
forms of the experiment, and their accuracies must not be compared.

- `without_early_attention` removes attention from a timm Swin or PVT v2 model. The late stages keep
  their windows or spatial reductions.
- `pvt_small_no_early_attention` and `swin_tiny_no_early_attention` are the rows that the paper
  published. Their late stages have attention of each token to all tokens.

| | parameters | multiply-adds at 224 | with early attention |
|---|---|---|---|
| pvt_small_no_early_attention | 19,869,864 | 3.6 G | PVT-S: 24,485,864, 3.8 G |
| swin_tiny_no_early_attention | 27,953,536 | 4.1 G | Swin-Ti: 28,288,354, 4.5 G |
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .classifier import default_cfg
from .lit_ti import LITTi, resize_positions
from .litv1 import LIT, resize_biases
from .pyramid import create


class MlpBlock(nn.Module):
    """The rest of a block without attention: x + drop_path2(mlp(norm2(x))), with the same names."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor, *size: Any) -> Tensor:
        # PVT v2 calls its MLPs with the map's height and width.
        return x + self.drop_path2(self.mlp(self.norm2(x), *size))


def without_early_attention(model: Any, stages: int = 2) -> Any:
    """Remove attention from the first stages of a timm Swin or PVT v2 model, in place.

    The remaining modules keep their names and weights. The original checkpoint therefore loads with
    strict=False.

    Args:
        model: timm's.
        stages: number of stages; default 2.
    Raises:
        ValueError: the model is of another family, or has fewer stages.
    """
    from timm.models.pvt_v2 import PyramidVisionTransformerV2
    from timm.models.swin_transformer import SwinTransformer

    if isinstance(model, SwinTransformer):
        all_stages = model.layers
    elif isinstance(model, PyramidVisionTransformerV2):
        all_stages = model.stages
    else:
        raise ValueError(f"model must be a timm Swin or PVT v2 model, got {type(model).__name__}")
    if not 0 <= stages <= len(all_stages):
        raise ValueError(f"stages must be from 0 to {len(all_stages)}, got {stages}")
    for stage in all_stages[:stages]:
        for index, block in enumerate(stage.blocks):
            if not isinstance(block, MlpBlock):
                stage.blocks[index] = MlpBlock(block)
    return model


class ConvolutionMerging(nn.Module):
    """PVT's merging of a map (B, H, W, dim): 2x2 convolution with stride 2, then a norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SwinMerging(PatchMerging):
    """Swin's merging of a map (B, H, W, dim). An odd last row or column is left out."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        return super().forward(x[:, :height, :width])

    def flops(self, height: int, width: int, *, offsets: int = 0) -> int:  # noqa: ARG002
        """Multiply-adds for one map, the norm at 1 an element. There are no offsets."""
        tokens = (height // 2) * (width // 2)
        return tokens * 4 * self.dim * (self.out_dim + 1)


class PVTNoEarlyAttention(LITTi):
    """PVT-S with two stages of MLPs and two of full attention: LIT-Ti with PVT's merging."""

    merging = ConvolutionMerging


class SwinNoEarlyAttention(LIT):
    """Swin with two stages of MLPs and two of full attention: LIT with Swin's merging."""

    merging = SwinMerging


default_cfgs = generate_default_cfgs(
    {
        "pvt_small_no_early_attention": default_cfg(
            first_conv="patch_embed1.proj", fixed_input_size=True
        ),
        "swin_tiny_no_early_attention": default_cfg(fixed_input_size=True),
    }
)


@register_model
def pvt_small_no_early_attention(pretrained: bool = False, **options: Any) -> PVTNoEarlyAttention:
    """PVT-S with full attention in stages 3 and 4 alone. Published with DeiT's recipe."""
    return build_model_with_cfg(
        PVTNoEarlyAttention,
        "pvt_small_no_early_attention",
        pretrained,
        pretrained_filter_fn=resize_positions,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def swin_tiny_no_early_attention(pretrained: bool = False, **options: Any) -> SwinNoEarlyAttention:
    """Swin-Ti with full attention in stages 3 and 4 alone. Published with Swin's recipe."""
    return create(
        SwinNoEarlyAttention,
        "swin_tiny_no_early_attention",
        pretrained,
        pretrained_filter_fn=resize_biases,
        **options,
    )
