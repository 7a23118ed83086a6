"""Self-distillation: students and averaged teachers on several crops, and contrastive learning."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import case

DISTILLATION = "self-distillation"


def encoder(**settings: Any) -> nn.Module:
    """A small ViT that takes crops of several sizes."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=96,
        depth=3,
        num_classes=0,
        dynamic_img_size=True,
        **settings,
    )


class Head(nn.Module):
    """The projection head of DINO: three layers, a norm, and prototypes."""

    def __init__(self, width: int, prototypes: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
        )
        self.prototypes = nn.Linear(64, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the prototypes."""
        return self.prototypes(F.normalize(self.layers(x), dim=-1))


class Distilled(nn.Module):
    """DINO: the student sees all crops, the averaged teacher the two large ones.

    Each forward first moves the teacher towards the student.
    """

    def __init__(self, masked: bool = False, prototypes: int = 512) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"body": encoder(), "head": Head(192, prototypes)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.masked = masked

    def forward(self, large: list[Tensor], small: list[Tensor]) -> Tensor:
        """The cross entropy between the teacher's and the student's scores."""
        body: Any = self.student["body"]
        head: Any = self.student["head"]
        teacher: Any = self.teacher["body"]
        with torch.no_grad():
            self.average()
            tokens = [teacher.forward_features(crop) for crop in large]
            targets = [self.teacher["head"](t[:, 0]) for t in tokens]
            patches = [self.teacher["head"](t[:, 1:]) for t in tokens]
        losses = []
        for number, crop in enumerate([*large, *small]):
            features = body.forward_features(crop)
            scores = head(features[:, 0])
            for other, target in enumerate(targets):
                if other != number:
                    losses.append(_cross_entropy(scores, target))
            if self.masked and number < len(large):
                losses.append(_cross_entropy(head(features[:, 1:]), patches[number]))
        return torch.stack(losses).mean()

    def average(self, momentum: float = 0.996) -> None:
        """Update the teacher: the moving average of the student."""
        teacher, student = self.teacher.parameters(), self.student.parameters()
        for average, weight in zip(teacher, student, strict=True):
            average.lerp_(weight, 1 - momentum)


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """The cross entropy with a sharpened target."""
    return -((target / 0.04).softmax(-1) * (scores / 0.1).log_softmax(-1)).sum(-1).mean()


def crops() -> tuple[list[Tensor], list[Tensor]]:
    """Two large crops and four small ones."""
    large = [torch.randn(4, 3, 96, 96) for _ in range(2)]
    return large, [torch.randn(4, 3, 48, 48) for _ in range(4)]


@case("DINO multi-crop", DISTILLATION)
def dino() -> tuple[nn.Module, Any]:
    """DINO."""
    return Distilled(), crops()


@case("iBOT / DINOv2 loss multi-crop", DISTILLATION)
def ibot() -> tuple[nn.Module, Any]:
    """DINO with a loss of each patch."""
    return Distilled(masked=True), crops()


@case("DINO with 65,536 prototypes", DISTILLATION)
def dino_of_many_prototypes() -> tuple[nn.Module, Any]:
    """DINO with the number of prototypes that its authors use."""
    return Distilled(prototypes=65536), crops()


@case("iBOT with 65,536 prototypes", DISTILLATION)
def ibot_of_many_prototypes() -> tuple[nn.Module, Any]:
    """DINO with a loss of each patch, and as many prototypes."""
    return Distilled(masked=True, prototypes=65536), crops()


class Pair(nn.Module):
    """SimCLR: two views of an image, NT-Xent loss over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", num_classes=0)
        self.head = nn.Sequential(
            nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True), nn.Linear(256, 64)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss."""
        z = F.normalize(self.head(self.body(torch.cat([first, second]))), dim=-1)
        scores = (z @ z.T / 0.1).fill_diagonal_(-1e4)
        rows = len(first)
        return F.cross_entropy(scores, torch.arange(2 * rows).roll(rows))


@case("SimCLR", DISTILLATION)
def simclr() -> tuple[nn.Module, Any]:
    """SimCLR on a ResNet."""
    return Pair(), (torch.randn(4, 3, 96, 96), torch.randn(4, 3, 96, 96))
