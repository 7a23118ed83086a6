"""Video models of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from . import case

VIDEO = "video"
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "image_size": 64,
    "patch_size": 16,
    "num_frames": 8,
}


def clips(batch: int = 2, frames: int = 8, size: int = 64) -> torch.Tensor:
    """A batch of clips."""
    return torch.randn(batch, frames, 3, size, size)


@case("VideoMAE classification", VIDEO)
def videomae() -> tuple[nn.Module, Any]:
    """VideoMAE with a classifier."""
    return hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**SIZES, num_labels=10)), clips()


@case("VideoMAE pre-training", "self-supervised pre-training")
def videomae_pretraining() -> tuple[nn.Module, Any]:
    """VideoMAE's masked autoencoder, with its loss."""
    decoder = {"decoder_hidden_size": 48, "decoder_num_hidden_layers": 2}
    decoder |= {"decoder_num_attention_heads": 3, "decoder_intermediate_size": 192}
    model = hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**SIZES, **decoder))
    mask = torch.zeros(2, 4 * 4 * 4, dtype=torch.bool)
    mask[:, 16:] = True
    return model, {"pixel_values": clips(), "bool_masked_pos": mask}


@case("V-JEPA 2", VIDEO)
def vjepa2() -> tuple[nn.Module, Any]:
    """V-JEPA 2's encoder and predictor: rotary positions on three axes."""
    config = hf.VJEPA2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=4, crop_size=64,
        frames_per_clip=8, pred_hidden_size=96, pred_num_attention_heads=3,
        pred_num_hidden_layers=2,
    )  # fmt: skip
    return hf.VJEPA2Model(config), {"pixel_values_videos": clips()}


@case("TimeSformer", VIDEO)
def timesformer() -> tuple[nn.Module, Any]:
    """TimeSformer: attention over space and over time in turns."""
    config = hf.TimesformerConfig(**SIZES, num_labels=10)
    return hf.TimesformerForVideoClassification(config), clips()


@case("ViViT", VIDEO)
def vivit() -> tuple[nn.Module, Any]:
    """ViViT: tubelets."""
    sizes = {k: v for k, v in SIZES.items() if k != "patch_size"}
    config = hf.VivitConfig(**sizes, tubelet_size=[2, 16, 16], num_labels=10)
    return hf.VivitForVideoClassification(config), clips()
