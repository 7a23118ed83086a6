"""Removal of attention from the early stages of timm's models: LIT's first experiment.

At high resolution attention costs most and, by the paper's measurement, hardly helps (arXiv
2105.14217). For Swin and PVT v2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
