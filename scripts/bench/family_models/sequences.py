"""Recurrent networks behind images, and images of several sizes as jagged tensors."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import case

SEQUENCES = "recurrent and jagged"


class TextReader(nn.Module):
    """As CRNN: the columns of a ResNet's features through an LSTM, with the loss of CTC."""

    def __init__(self, width: int = 96, classes: int = 40) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(2,))
        self.lstm = nn.LSTM(128 * 4, width, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """The loss of the texts."""
        columns = self.body(pixels)[0].permute(0, 3, 1, 2).flatten(2)
        logits = self.head(self.lstm(columns)[0]).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(pixels),), len(logits)), torch.full((len(pixels),), text.shape[1])
        return F.ctc_loss(logits, text, *lengths)


@case("CRNN (LSTM and CTC)", SEQUENCES)
def crnn() -> tuple[nn.Module, Any]:
    """A reader of text lines."""
    return TextReader(), (torch.randn(4, 3, 32, 256), torch.randint(1, 40, (4, 8)))


class RecurrentPolicy(nn.Module):
    """As BC-RNN: features of each frame and the state through a GRU, to the next actions."""

    def __init__(self, width: int = 96, actions: int = 7) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", num_classes=width)
        self.gru = nn.GRU(width + actions, width, 2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, actions))

    def forward(self, frames: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """The squared error of the actions."""
        seen = self.body(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        hidden, _ = self.gru(torch.cat([seen, states], -1))
        return F.mse_loss(self.head(hidden), actions)


@case("BC-RNN (GRU)", SEQUENCES)
def recurrent_policy() -> tuple[nn.Module, Any]:
    """A policy on clips."""
    inputs = torch.randn(2, 8, 3, 64, 64), torch.randn(2, 8, 7), torch.randn(2, 8, 7)
    return RecurrentPolicy(), inputs


class JaggedBlock(nn.Module):
    """A block of a ViT whose layers PyTorch defines for jagged tensors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = [nn.Linear(width, width) for _ in range(4)]
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block on tokens (B, jagged, C)."""
        y, shape = self.norm1(x), (x.size(0), -1, self.heads, x.size(-1) // self.heads)
        q, k, v = [part(y).reshape(shape).transpose(1, 2) for part in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(y.reshape(x.size(0), -1, x.size(-1)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class JaggedViT(nn.Module):
    """As NaViT: images of several sizes, of which no token is padding."""

    def __init__(self, width: int = 96, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(3 * 16 * 16, width), nn.Linear(2, width)
        self.blocks = nn.Sequential(*[JaggedBlock(width, 3) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, patches: list[Tensor], positions: list[Tensor]) -> Tensor:
        """The logits of each image."""
        tokens = [
            self.embed(p) + self.position(at) for p, at in zip(patches, positions, strict=True)
        ]
        x = self.blocks(torch.nested.as_nested_tensor(tokens, layout=torch.jagged))
        return self.head(torch.stack([image.mean(0) for image in x.unbind()]))


@case("NaViT (jagged tensors)", SEQUENCES)
def navit() -> tuple[nn.Module, Any]:
    """A ViT on images of 8 x 8, 12 x 4 and 6 x 9 patches."""
    sizes = (8, 8), (12, 4), (6, 9)
    patches = [torch.randn(rows * columns, 3 * 16 * 16) for rows, columns in sizes]
    positions = [
        torch.cartesian_prod(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns))
        for rows, columns in sizes
    ]
    return JaggedViT(), (patches, positions)
