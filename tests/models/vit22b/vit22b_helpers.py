"""Small ViT-22B models and blocks for the tests of this folder."""

import timm
import torch
from torch import nn

from mesa_train.models.vit22b.layers import ParallelBlock

WIDTH, HEADS, TOKENS = 128, 2, 32


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def block(dtype=torch.float64, **options):
    """A block whose norms' gains and biases are not those of the initialisation."""
    created = ParallelBlock(WIDTH, HEADS, dtype=dtype, **options)
    for parameter in created.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, parameter in created.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return created


def tiny(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, **options)
    nn.init.normal_(model.head.weight, std=0.1)  # it starts at zero, and so would all gradients
    return model.train()
