"""Denoisers of diffusers, on noisy latents with their conditions. Most are tuned with adapters."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from . import case

DIFFUSION = "diffusion"
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")


def steps(batch: int = 2) -> torch.Tensor:
    """Noise levels."""
    return torch.randint(1, 1000, (batch,))


@case("DiT", DIFFUSION)
def dit() -> tuple[nn.Module, Any]:
    """DiT with classes."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3,
        sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": steps(),
        "class_labels": torch.randint(1000, (2,)),
    }
    return model, inputs


@case("PixArt", DIFFUSION, lora=ADAPTED)
def pixart() -> tuple[nn.Module, Any]:
    """PixArt with captions."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=96, caption_channels=64, sample_size=16, patch_size=2,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 24, 64),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


@case("Stable Diffusion 3", DIFFUSION, lora=ADAPTED)
def sd3() -> tuple[nn.Module, Any]:
    """Stable Diffusion 3: joint blocks, norms of queries and keys."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=96,
        pooled_projection_dim=32, out_channels=16, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 16, 16),
        "encoder_hidden_states": torch.randn(2, 24, 64),
        "pooled_projections": torch.randn(2, 32),
        "timestep": steps(),
    }
    return model, inputs


@case("Flux", DIFFUSION, lora=ADAPTED)
def flux() -> tuple[nn.Module, Any]:
    """Flux: double and single blocks, rotary positions."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(8, 8, 8),
    )  # fmt: skip
    rows = torch.arange(64)
    places = torch.stack([torch.zeros(64), rows // 8, rows % 8], 1)
    inputs = {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, 24, 64),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.rand(2),
        "img_ids": places,
        "txt_ids": torch.zeros(24, 3),
        "guidance": torch.ones(2),
    }
    return model, inputs


@case("Wan (video)", DIFFUSION, lora=ADAPTED)
def wan() -> tuple[nn.Module, Any]:
    """Wan: latents of a video."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=8,
        out_channels=8, text_dim=64, freq_dim=32, ffn_dim=256, num_layers=3,
        rope_max_seq_len=64,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 8, 4, 12, 12),
        "timestep": steps(1),
        "encoder_hidden_states": torch.randn(1, 24, 64),
    }
    return model, inputs


@case("Qwen-Image", DIFFUSION, lora=ADAPTED)
def qwen_image() -> tuple[nn.Module, Any]:
    """Qwen-Image: double blocks with complex rotary positions."""
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=64, axes_dims_rope=(8, 8, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, 24, 64),
        "encoder_hidden_states_mask": torch.ones(2, 24, dtype=torch.long),
        "timestep": torch.rand(2),
        "img_shapes": [[(1, 8, 8)]] * 2,
    }
    return model, inputs


@case("Sana", DIFFUSION, lora=ADAPTED)
def sana() -> tuple[nn.Module, Any]:
    """Sana: linear attention, gated depthwise convolutions."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=24, num_layers=3,
        num_cross_attention_heads=4, cross_attention_head_dim=24, cross_attention_dim=96,
        caption_channels=64, sample_size=16, patch_size=1,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 8, 12, 12),
        "encoder_hidden_states": torch.randn(2, 24, 64),
        "timestep": steps(),
    }
    return model, inputs


@case("U-Net of Stable Diffusion", DIFFUSION, lora=ADAPTED)
def unet() -> tuple[nn.Module, Any]:
    """The U-Net of Stable Diffusion: residual blocks and cross attention."""
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": steps(),
        "encoder_hidden_states": torch.randn(2, 24, 64),
    }
    return model, inputs


@case("Autoencoder of Stable Diffusion", DIFFUSION)
def autoencoder() -> tuple[nn.Module, Any]:
    """The autoencoder: residual blocks with group norm."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, sample_size=64, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, torch.randn(2, 3, 64, 64)
