"""Vision-language models of transformers: towers with packed patches, and whole models with a loss."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from . import case

VLM, TOWERS = "vision-language", "dual towers"
TEXT: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
PROJECTIONS = ("q_proj", "v_proj")
IMAGE = 999


def captions(images: int, rows: int = 2, length: int = 96) -> dict[str, torch.Tensor]:
    """Tokens that begin with the places of an image, and their labels."""
    tokens = torch.randint(0, 900, (rows, length))
    tokens[:, :images] = IMAGE
    labels = tokens.clone()
    labels[:, :images] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@case("Qwen2.5-VL tower", VLM)
def qwen25_tower() -> tuple[nn.Module, Any]:
    """Qwen2.5-VL's vision tower on the packed patches of two images: window attention."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel as Tower,
    )
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=96,
        fullatt_block_indexes=[2], patch_size=14, window_size=56,
    )  # fmt: skip
    grid = torch.tensor([[1, 8, 12], [1, 6, 8]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    return Tower(config), (patches, grid)


@case("Qwen3-VL tower", VLM)
def qwen3_tower() -> tuple[nn.Module, Any]:
    """Qwen3-VL's vision tower on packed patches: interpolated positions, deep features."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import (
        Qwen3VLVisionConfig,
        Qwen3VLVisionModel,
    )

    config = Qwen3VLVisionConfig(
        depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=96,
        deepstack_visual_indexes=[1], patch_size=16, num_position_embeddings=64,
    )  # fmt: skip
    grid = torch.tensor([[1, 8, 12], [1, 6, 8]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 16 * 16)
    return Qwen3VLVisionModel(config), (patches, grid)


@case("Llama 4 tower", VLM)
def llama4_tower() -> tuple[nn.Module, Any]:
    """Llama 4's vision tower: rotary positions as complex products, pixel shuffle."""
    from transformers.models.llama4.modeling_llama4 import Llama4VisionConfig, Llama4VisionModel

    config = Llama4VisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        image_size=112, patch_size=14, vision_output_dim=96, projector_input_dim=96,
        projector_output_dim=96,
    )  # fmt: skip
    return Llama4VisionModel(config), {"pixel_values": torch.randn(2, 3, 112, 112)}


@case("SmolVLM", VLM, lora=PROJECTIONS)
def smolvlm() -> tuple[nn.Module, Any]:
    """SmolVLM with the loss of its captions."""
    vision = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    config = hf.SmolVLMConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "llama"}, scale_factor=2,
        image_token_id=IMAGE,
    )  # fmt: skip
    inputs = {**captions(16), "pixel_values": torch.randn(2, 1, 3, 64, 64)}
    return hf.SmolVLMForConditionalGeneration(config), inputs


@case("PaliGemma", VLM, lora=PROJECTIONS)
def paligemma() -> tuple[nn.Module, Any]:
    """PaliGemma with the loss of its suffixes: SigLIP and Gemma."""
    vision = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 96}
    text = {**TEXT, "model_type": "gemma"}
    config = hf.PaliGemmaConfig(
        vision_config={**vision, "model_type": "siglip_vision_model"}, text_config=text,
        projection_dim=96, image_token_index=IMAGE,
    )  # fmt: skip
    inputs = {**captions(16), "pixel_values": torch.randn(2, 3, 56, 56)}
    inputs["token_type_ids"] = (torch.arange(96) >= 48).long().expand(2, 96)
    return hf.PaliGemmaForConditionalGeneration(config), inputs


@case("LLaVA", VLM, lora=PROJECTIONS)
def llava() -> tuple[nn.Module, Any]:
    """LLaVA with the loss of its answers: CLIP and Llama."""
    vision = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    config = hf.LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"}, image_token_index=IMAGE,
    )  # fmt: skip
    inputs = {**captions(16), "pixel_values": torch.randn(2, 3, 56, 56)}
    return hf.LlavaForConditionalGeneration(config), inputs


@case("Florence-2", VLM, lora=PROJECTIONS)
def florence() -> tuple[nn.Module, Any]:
    """Florence-2: DaViT and BART."""
    vision = hf.Florence2VisionConfig(
        depths=(1, 1, 1, 1), embed_dim=(24, 48, 96, 96), num_heads=(1, 2, 4, 4),
        num_groups=(1, 2, 4, 4), window_size=4, projection_dim=96, max_temporal_embeddings=10,
        max_position_embeddings=10,
    )  # fmt: skip
    text = hf.BartConfig(
        vocab_size=1000, d_model=96, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256,
        decoder_ffn_dim=256, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    config = hf.Florence2Config(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE
    )
    inputs = captions(17)
    inputs["labels"] = torch.randint(0, 900, (2, 48))
    return (
        hf.Florence2ForConditionalGeneration(config),
        {**inputs, "pixel_values": torch.randn(2, 3, 128, 128)},
    )


@case("CLIP contrastive", TOWERS)
def clip() -> tuple[nn.Module, Any]:
    """CLIP's two towers with the contrastive loss."""
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 3, "image_size": 112, "patch_size": 14}
    text = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 32}
    text |= {"eos_token_id": 999}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    inputs = {
        "input_ids": torch.randint(0, 900, (8, 32)),
        "pixel_values": torch.randn(8, 3, 112, 112),
        "return_loss": True,
    }
    return hf.CLIPModel(config), inputs


@case("SigLIP sigmoid loss", TOWERS)
def siglip() -> tuple[nn.Module, Any]:
    """SigLIP's two towers with the sigmoid loss of all pairs."""
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 3, "image_size": 112, "patch_size": 14}
    text = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 32}
    text |= {"projection_size": 96}
    config = hf.SiglipConfig(text_config=text, vision_config=vision)
    inputs = {
        "input_ids": torch.randint(0, 900, (8, 32)),
        "pixel_values": torch.randn(8, 3, 112, 112),
        "return_loss": True,
    }
    return hf.SiglipModel(config), inputs


@case("OWLv2", TOWERS)
def owlv2() -> tuple[nn.Module, Any]:
    """OWLv2: CLIP's towers with a box for each patch."""
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 3, "image_size": 112, "patch_size": 14}
    text = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 16}
    config = hf.Owlv2Config(text_config=text, vision_config=vision, projection_dim=96)
    inputs = {
        "input_ids": torch.randint(1, 900, (4, 16)),
        "attention_mask": torch.ones(4, 16, dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 112, 112),
    }
    return hf.Owlv2ForObjectDetection(config), inputs
