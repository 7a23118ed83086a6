"""Detection, segmentation and depth in transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.sam2_video import modeling_sam2_video

from . import case

SEGMENTATION, DETECTION, DEPTH = "promptable and dense segmentation", "detection", "depth"
ENCODER: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 384,
}


def images(size: int = 128, batch: int = 2) -> torch.Tensor:
    """A batch of images."""
    return torch.randn(batch, 3, size, size)


def boxes(classes: int = 5) -> list[dict[str, torch.Tensor]]:
    """Targets of a detector for two images: relative boxes and classes."""
    centers = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2], [0.5, 0.5, 0.6, 0.6]])
    labels = torch.arange(3) % classes
    return [{"boxes": centers, "class_labels": labels}] * 2


def swin() -> hf.SwinConfig:
    """A small Swin backbone with four outputs."""
    return hf.SwinConfig(
        image_size=128, embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def resnet(stages: tuple[int, ...] = (2, 3, 4)) -> hf.ResNetConfig:
    """A small ResNet backbone."""
    return hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1],
        out_features=[f"stage{n}" for n in stages],
    )  # fmt: skip


@case("SAM", SEGMENTATION)
def sam() -> tuple[nn.Module, Any]:
    """SAM: windowed encoder with relative positions, prompt encoder, mask decoder."""
    vision = {**ENCODER, "image_size": 128, "patch_size": 16, "output_channels": 64}
    vision |= {"mlp_dim": 384, "global_attn_indexes": [1, 3], "window_size": 4, "num_pos_feats": 32}
    prompt = {"hidden_size": 64, "image_size": 128, "patch_size": 16}
    decoder = {"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4}
    decoder |= {"iou_head_hidden_dim": 64, "attention_downsample_rate": 2}
    config = hf.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    points = torch.rand(2, 1, 2, 2) * 128
    return hf.SamModel(config), {"pixel_values": images(), "input_points": points}


@case("SAM 2", SEGMENTATION)
def sam2() -> tuple[nn.Module, Any]:
    """SAM 2 on images: Hiera, feature pyramid, mask decoder."""
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=32, image_size=[128, 128], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[32, 64, 128, 256], num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[3], window_size_per_stage=[8, 4, 8, 4],
    )  # fmt: skip
    vision = hf.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[256, 128, 64, 32], fpn_hidden_size=64,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )  # fmt: skip
    prompt = {"hidden_size": 64, "image_size": 128}
    decoder = {"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4}
    config = hf.Sam2Config(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    points = torch.rand(2, 1, 2, 2) * 128
    return hf.Sam2Model(config), {"pixel_values": images(), "input_points": points}


class MemoryOfVideo(nn.Module):
    """SAM 2's memory of a video: the memory of frame 1 enters the features of frame 2."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.Sam2VideoConfig(
            memory_attention_num_layers=2, memory_attention_hidden_size=256,
            memory_attention_feed_forward_hidden_size=512, memory_attention_num_attention_heads=1,
            memory_attention_rope_feat_sizes=[16, 16], memory_attention_dropout=0.0,
            memory_attention_rope_dropout=0.0,
        )  # fmt: skip
        self.encoder = modeling_sam2_video.Sam2VideoMemoryEncoder(config)
        self.attention = modeling_sam2_video.Sam2VideoMemoryAttention(config)

    def forward(self, first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
        memory, positions = self.encoder(first, masks)
        tokens, memory, positions = (
            x.flatten(2).permute(2, 0, 1) for x in (second, memory, positions)
        )
        attended: Tensor = self.attention(
            tokens, memory, torch.zeros_like(tokens), memory_posision_embeddings=positions
        )
        return attended


@case("SAM 2, memory", SEGMENTATION)
def sam2_memory() -> tuple[nn.Module, Any]:
    """SAM 2 on video: memory encoder and memory attention with rotary positions."""
    frames = torch.randn(2, 1, 256, 16, 16)
    return MemoryOfVideo(), {"first": frames[0], "second": frames[1], "masks": images(256)[:1, :1]}


@case("SAM 3", SEGMENTATION)
def sam3() -> tuple[nn.Module, Any]:
    """SAM 3 on images: rotary ViT, text encoder, DETR, mask decoder; prompted by words and boxes."""
    vit = hf.Sam3ViTConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3,
        image_size=112, pretrain_image_size=112, window_size=4, global_attn_indexes=[1],
    )  # fmt: skip
    vision = hf.Sam3VisionConfig(
        backbone_config=vit, fpn_hidden_size=64,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    part = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 1000, "projection_dim": 64}
    config = hf.Sam3Config(
        vision_config=vision, text_config=text, geometry_encoder_config={**part, "num_layers": 2},
        detr_encoder_config={**part, "num_layers": 2},
        detr_decoder_config={**part, "num_layers": 2, "num_queries": 20},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 4},
    )  # fmt: skip
    inputs = {
        "pixel_values": images(112),
        "input_ids": torch.randint(3, 900, (2, 12)),
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "input_boxes": torch.tensor([[[0.4, 0.4, 0.3, 0.3]], [[0.6, 0.5, 0.2, 0.4]]]),
        "input_boxes_labels": torch.ones(2, 1, dtype=torch.int64),
    }
    return hf.Sam3Model(config), inputs


@case("SegFormer", SEGMENTATION)
def segformer() -> tuple[nn.Module, Any]:
    """SegFormer with its loss."""
    config = hf.SegformerConfig(
        hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], decoder_hidden_size=64, num_labels=5
    )
    labels = torch.randint(5, (2, 128, 128))
    return hf.SegformerForSemanticSegmentation(config), {"pixel_values": images(), "labels": labels}


@case("Mask2Former", SEGMENTATION)
def mask2former() -> tuple[nn.Module, Any]:
    """Mask2Former with its matching loss: deformable pixel decoder, masked attention."""
    config = hf.Mask2FormerConfig(
        backbone_config=swin(), feature_size=64, mask_feature_size=64, hidden_dim=64,
        encoder_feedforward_dim=128, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
        dim_feedforward=128, num_queries=20, num_labels=5, train_num_points=512,
    )  # fmt: skip
    masks = [torch.zeros(3, 128, 128) for _ in range(2)]
    for index, mask in enumerate(masks):
        for row in range(3):
            mask[row, 16 * row : 16 * row + 48, 20 + index : 90] = 1
    labels = [torch.arange(3)] * 2
    inputs = {"pixel_values": images(), "mask_labels": masks, "class_labels": labels}
    return hf.Mask2FormerForUniversalSegmentation(config), inputs


@case("EoMT", SEGMENTATION)
def eomt() -> tuple[nn.Module, Any]:
    """EoMT: queries inside of a ViT, with attention masks."""
    config = hf.EomtConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=128, patch_size=16,
        num_blocks=2, num_queries=20, num_labels=5, train_num_points=512,
    )  # fmt: skip
    masks = [torch.randint(2, (3, 128, 128)).float() for _ in range(2)]
    labels = [torch.arange(3)] * 2
    inputs = {"pixel_values": images(), "mask_labels": masks, "class_labels": labels}
    return hf.EomtForUniversalSegmentation(config), inputs


@case("UperNet with Swin", SEGMENTATION)
def upernet() -> tuple[nn.Module, Any]:
    """UperNet: pyramid pooling over a Swin."""
    config = hf.UperNetConfig(
        backbone_config=swin(), hidden_size=64, auxiliary_in_channels=96, auxiliary_channels=32,
        num_labels=5,
    )  # fmt: skip
    labels = torch.randint(5, (2, 128, 128))
    return hf.UperNetForSemanticSegmentation(config), {"pixel_values": images(), "labels": labels}


def with_default_convolutions(model: nn.Module) -> nn.Module:
    """Give the convolutions PyTorch's initial weights, and the last one a positive bias.

    With the library's initial weights the depth is about 1e-8. Then almost the whole gradient belongs
    to the last bias, so a gradient error says nothing.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for convolution in convolutions:
        convolution.reset_parameters()
    last = convolutions[-1].bias
    assert last is not None
    nn.init.constant_(last, 0.1)
    return model


@case("DPT", DEPTH)
def dpt() -> tuple[nn.Module, Any]:
    """DPT on a ViT."""
    config = hf.DPTConfig(
        **ENCODER, image_size=128, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[24, 32, 48, 64], fusion_hidden_size=32,
    )  # fmt: skip
    return with_default_convolutions(hf.DPTForDepthEstimation(config)), images()


@case("Depth Anything", DEPTH)
def depth_anything() -> tuple[nn.Module, Any]:
    """Depth Anything: DPT's head on DINOv2."""
    backbone = hf.Dinov2Config(
        **ENCODER, image_size=112, patch_size=14, out_indices=[1, 2, 3, 4],
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=96, neck_hidden_sizes=[24, 32, 48, 64],
        fusion_hidden_size=32, head_hidden_size=16,
    )  # fmt: skip
    return with_default_convolutions(hf.DepthAnythingForDepthEstimation(config)), images(112)


@case("DETR", DETECTION)
def detr() -> tuple[nn.Module, Any]:
    """DETR with its matching loss."""
    config = hf.DetrConfig(
        backbone_config=resnet((4,)), use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=20,
        num_labels=5, backbone=None,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config), {"pixel_values": images(), "labels": boxes()}


@case("Deformable DETR", DETECTION)
def deformable() -> tuple[nn.Module, Any]:
    """Deformable DETR: attention by grid_sample."""
    config = hf.DeformableDetrConfig(
        backbone_config=resnet(), use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=20,
        num_labels=5, backbone=None,
    )  # fmt: skip
    return (
        hf.DeformableDetrForObjectDetection(config),
        {"pixel_values": images(), "labels": boxes()},
    )


def _real_time(kind: str) -> hf.PretrainedConfig:
    """The small configuration of a real-time detector: RTDetr, RTDetrV2 or DFine."""
    sizes = {
        "encoder_hidden_dim": 64,
        "encoder_in_channels": [48, 64, 96],
        "decoder_in_channels": [64, 64, 64],
        "encoder_ffn_dim": 128,
        "d_model": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
        "decoder_layers": 2,
        "num_queries": 20,
        "num_denoising": 10,
        "num_labels": 5,
    }
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return getattr(hf, f"{kind}Config")(backbone_config=backbone, **sizes)


@case("RT-DETR", DETECTION)
def rt_detr() -> tuple[nn.Module, Any]:
    """RT-DETR with its loss and its denoising queries."""
    model = hf.RTDetrForObjectDetection(_real_time("RTDetr"))
    return model, {"pixel_values": images(), "labels": boxes()}


@case("D-FINE", DETECTION)
def d_fine() -> tuple[nn.Module, Any]:
    """D-FINE: boxes as distributions."""
    model = hf.DFineForObjectDetection(_real_time("DFine"))
    return model, {"pixel_values": images(), "labels": boxes()}


@case("RF-DETR", DETECTION)
def rf_detr() -> tuple[nn.Module, Any]:
    """RF-DETR: a windowed DINOv2, deformable attention, groups of queries."""
    backbone = hf.RfDetrDinov2Config(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=112, patch_size=14,
        num_windows=2, out_features=["stage2", "stage4"],
    )  # fmt: skip
    config = hf.RfDetrConfig(
        backbone_config=backbone, d_model=64, decoder_ffn_dim=128, decoder_layers=2,
        decoder_self_attention_heads=4, decoder_cross_attention_heads=4, num_queries=20,
        group_detr=3, num_labels=5,
    )  # fmt: skip
    return hf.RfDetrForObjectDetection(config), {"pixel_values": images(112), "labels": boxes()}


@case("YOLOS", DETECTION)
def yolos() -> tuple[nn.Module, Any]:
    """YOLOS: a ViT with detection tokens."""
    config = hf.YolosConfig(
        **ENCODER, image_size=[128, 128], patch_size=16, num_detection_tokens=20, num_labels=5
    )
    return hf.YolosForObjectDetection(config), {"pixel_values": images(), "labels": boxes()}
