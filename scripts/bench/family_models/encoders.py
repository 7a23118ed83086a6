"""Image encoders of transformers: fine-tuned as a whole, or with adapters."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from . import case

IMAGE_ENCODERS = "image encoders"
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "image_size": 112,
    "patch_size": 14,
}
PROJECTIONS = ("q_proj", "v_proj", "query", "value")


def images(size: int = 112, batch: int = 4) -> torch.Tensor:
    """A batch of images."""
    return torch.randn(batch, 3, size, size)


@case("DINOv2", IMAGE_ENCODERS, lora=PROJECTIONS)
def dinov2() -> tuple[nn.Module, Any]:
    """DINOv2 with a classifier."""
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, num_labels=10)), images()


@case("DINOv2 with registers", IMAGE_ENCODERS, lora=PROJECTIONS)
def registers() -> tuple[nn.Module, Any]:
    """DINOv2 with registers, with a classifier."""
    config = hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4, num_labels=10)
    return hf.Dinov2WithRegistersForImageClassification(config), images()


@case("DINOv3 ViT", IMAGE_ENCODERS, lora=PROJECTIONS)
def dinov3() -> tuple[nn.Module, Any]:
    """DINOv3's ViT: rotary positions, gated MLP."""
    config = hf.DINOv3ViTConfig(**{**SIZES, "patch_size": 16}, use_gated_mlp=True)
    return hf.DINOv3ViTModel(config), images()


@case("SigLIP 2 (NaFlex)", IMAGE_ENCODERS, lora=PROJECTIONS)
def siglip2() -> tuple[nn.Module, Any]:
    """SigLIP 2's tower on patches of images of three shapes."""
    sizes = {k: v for k, v in SIZES.items() if k != "image_size"}
    config = hf.Siglip2VisionConfig(**sizes, num_patches=64)
    shapes = torch.tensor([[8, 8], [4, 12], [6, 9], [8, 6]])
    mask = torch.arange(64)[None] < shapes.prod(1)[:, None]
    pixels = torch.randn(4, 64, 3 * 14 * 14)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return hf.Siglip2VisionModel(config), inputs


@case("ViT-MAE pre-training", "self-supervised pre-training")
def mae() -> tuple[nn.Module, Any]:
    """The masked autoencoder, with its loss."""
    sizes = {**SIZES, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 2}
    sizes |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 256}
    return hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes)), images()


@case("BEiT", IMAGE_ENCODERS)
def beit() -> tuple[nn.Module, Any]:
    """BEiT: relative positions, layer scale."""
    config = hf.BeitConfig(**SIZES, use_relative_position_bias=True, num_labels=10)
    return hf.BeitForImageClassification(config), images()


@case("I-JEPA", "self-supervised pre-training")
def ijepa() -> tuple[nn.Module, Any]:
    """I-JEPA's encoder."""
    return hf.IJepaModel(hf.IJepaConfig(**SIZES)), images()


@case("Hiera", IMAGE_ENCODERS)
def hiera() -> tuple[nn.Module, Any]:
    """Hiera: mask units, pooled queries."""
    config = hf.HieraConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=[224, 224]
    )
    return hf.HieraModel(config), images(224, 2)


@case("Swin V2", IMAGE_ENCODERS)
def swinv2() -> tuple[nn.Module, Any]:
    """Swin V2: windows, scaled cosine attention."""
    config = hf.Swinv2Config(
        image_size=128, embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=8, num_labels=10
    )
    return hf.Swinv2ForImageClassification(config), images(128, 2)


@case("PE / timm wrapper", IMAGE_ENCODERS)
def wrapper() -> tuple[nn.Module, Any]:
    """A timm model inside transformers, as the hub's timm checkpoints load."""
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"img_size": 112, "depth": 3}, num_labels=10
    )
    return hf.TimmWrapperForImageClassification(config), images()
