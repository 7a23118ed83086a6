"""Policies of robots: images and states to a chunk of actions."""

from __future__ import annotations

from typing import Any

import timm
import torch
import transformers as hf
from torch import Tensor, nn

from . import case
from .language import IMAGE, TEXT

POLICIES = "robots' policies"


@case("pi0", POLICIES, lora=("q_proj", "v_proj"))
def pi0() -> tuple[nn.Module, Any]:
    """pi0: PaliGemma with an action expert, flow matching."""
    text = {**TEXT, "model_type": "gemma", "num_key_value_heads": 1}
    vision = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    vlm = {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": {**vision, "model_type": "siglip_vision_model", "vision_use_head": False},
        "projection_dim": 96,
        "image_token_id": IMAGE,
    }
    expert = {"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "hidden_size": 64}
    config = hf.PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=16)
    tokens = torch.randint(0, 900, (2, 40))
    tokens[:, :16] = IMAGE
    inputs = {
        "state": torch.randn(2, 32),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(2, 1, 3, 56, 56),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "actions": torch.randn(2, 16, 32),
    }
    return hf.PI0ForConditionalGeneration(config), inputs


class VisionLanguageAction(nn.Module):
    """As SmolVLA: a tower and the first layers of a small language model, and an action expert.

    The expert attends to the language model's features and predicts the flow of a chunk of actions.
    """

    def __init__(self, width: int = 96, actions: int = 7) -> None:
        super().__init__()
        vision = hf.SiglipVisionConfig(
            hidden_size=width, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            image_size=56, patch_size=14, vision_use_head=False,
        )  # fmt: skip
        self.tower = hf.SiglipVisionModel(vision)
        self.language = hf.LlamaModel(hf.LlamaConfig(**TEXT))
        self.state = nn.Linear(actions, width)
        self.action_in, self.action_out = nn.Linear(actions, width), nn.Linear(width, actions)
        self.time = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerDecoderLayer(
            width, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.expert = nn.TransformerDecoder(layer, 3)

    def forward(self, pixels: Tensor, tokens: Tensor, state: Tensor, actions: Tensor) -> Tensor:
        """The loss of the flow at a random time."""
        seen = self.tower(pixels).last_hidden_state
        words = self.language.embed_tokens(tokens)
        prefix = torch.cat([seen, words, self.state(state)[:, None]], 1)
        context = self.language(inputs_embeds=prefix, use_cache=False).last_hidden_state
        noise, time = torch.randn_like(actions), torch.rand(len(actions), 1, 1)
        mixed = self.action_in(time * noise + (1 - time) * actions)
        mixed = self.time(torch.cat([mixed, time.expand_as(mixed)], -1))
        flow = self.action_out(self.expert(mixed, context))
        return (flow - (noise - actions)).square().mean()


@case("SmolVLA-like", POLICIES)
def smolvla() -> tuple[nn.Module, Any]:
    """A tower, a small language model and an action expert."""
    inputs = (
        torch.randn(2, 3, 56, 56),
        torch.randint(0, 900, (2, 24)),
        torch.randn(2, 7),
        torch.randn(2, 16, 7),
    )
    return VisionLanguageAction(), inputs


class ActionChunks(nn.Module):
    """As ACT: a ResNet's features and the state through a transformer, to a chunk of actions."""

    def __init__(self, width: int = 96, actions: int = 7, chunk: int = 16) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(4,))
        self.project, self.state = nn.Conv2d(512, width, 1), nn.Linear(actions, width)
        self.transformer = nn.Transformer(width, 4, 3, 2, 256, 0.1, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, chunk, width))
        self.head = nn.Linear(width, actions)

    def forward(self, pixels: Tensor, state: Tensor, actions: Tensor) -> Tensor:
        """The L1 loss."""
        seen = self.project(self.body(pixels)[0]).flatten(2).transpose(1, 2)
        source = torch.cat([self.state(state)[:, None], seen], 1)
        target = self.queries.expand(len(pixels), -1, -1)
        return (self.head(self.transformer(source, target)) - actions).abs().mean()


@case("ACT-like", POLICIES)
def act() -> tuple[nn.Module, Any]:
    """A ResNet and a transformer."""
    inputs = (torch.randn(4, 3, 128, 128), torch.randn(4, 7), torch.randn(4, 16, 7))
    return ActionChunks(), inputs
