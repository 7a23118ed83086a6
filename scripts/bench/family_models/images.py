"""Classifiers of timm, small ones of families that differ."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from . import case

TIMM = "timm classifiers"
# Model, its settings, and the size of the images.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 112, "depth": 3}, 112),
    "eva02_tiny_patch14_224": ({"img_size": 112, "depth": 3}, 112),
    "swin_tiny_patch4_window7_224": ({"img_size": 112, "depths": (1, 1, 2, 1)}, 112),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 128}, 128),
    "coatnet_nano_rw_224": ({"img_size": 96}, 96),
    "convnext_atto": ({}, 96),
    "resnet18": ({}, 96),
    "efficientnet_b0": ({}, 96),
    "mobilenetv2_100": ({}, 96),
    "mobilenetv4_conv_small": ({}, 96),
    "nf_regnet_b0": ({}, 96),
    "levit_128s": ({}, 224),
    "fastvit_t8": ({}, 96),
    "mambaout_femto": ({}, 96),
    "regnety_002": ({}, 96),
}


def _classifier(name: str, settings: dict[str, Any], size: int) -> None:
    """Add a classifier's case."""
    adapters = ("qkv", "fc1") if name.startswith("vit") else None

    @case(f"timm {name}", TIMM, lora=adapters)
    def make() -> tuple[nn.Module, Any]:
        model = timm.create_model(name, num_classes=10, **settings)
        return model, torch.randn(4 if size < 200 else 2, 3, size, size)


for _name, (_settings, _size) in MODELS.items():
    _classifier(_name, _settings, _size)
