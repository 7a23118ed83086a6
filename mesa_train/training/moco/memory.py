"""The bytes of a step of MoCo v3 on one card, and the largest batch: counted on fake tensors.

A step holds the model states, both views of the images in float32, and its activations under bfloat16
autocast. The model states are weights, gradients and the optimizer's moments in float32 (two for
AdamW, one for LARS), and the momentum encoder. The ways:

- joint: both views' forwards, then one backward, as in the authors' step.
- by view: one view's forward and backward, then the other's (`backward_by_view`).
- chunks: the trunk of a view in chunks of images, the heads on the full batch.

The heads have a square of similarities, so their bytes are no line in the batch. They are counted at
several batches, and a line between two of them lies above the curve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.estimate.activations import Activations, activations_of
from mesa_train.estimate.estimator import RESERVE, parameters_of
from mesa_train.estimate.model_states import Cluster, states
from mesa_train.loading.model import Loaded
from mesa_train.models.moco import MoCo, moco_loss

GIB = 2**30
WAYS = ("joint", "by view", "chunks")
SIZES, HEAD_SIZES = (64, 4096, 16384), (64, 4096, 16384, 65536)
CHUNK = 64
Counted = dict[str, tuple[Callable[[int], int], int]]


class Joint(nn.Module):
    """Both sides of the loss; the keys stand for those of the momentum encoder."""

    def __init__(self, moco: MoCo) -> None:
        super().__init__()
        self.moco = moco

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, q2 = self.moco.query(x1), self.moco.query(x2)
        return moco_loss(q1, q2.detach()) + moco_loss(q2, q1.detach())


class View(nn.Module):
    """One side of the loss."""

    def __init__(self, moco: MoCo) -> None:
        super().__init__()
        self.moco = moco

    def forward(self, x: Tensor) -> Tensor:
        q = self.moco.query(x)
        return moco_loss(q, q.detach())


class Trunk(nn.Module):
    """Features of a chunk."""

    def __init__(self, moco: MoCo) -> None:
        super().__init__()
        self.moco = moco

    def forward(self, x: Tensor) -> Tensor:
        return self.moco.features(self.moco.base_encoder, x)


class Heads(nn.Module):
    """One side of the loss of cached features."""

    def __init__(self, moco: MoCo) -> None:
        super().__init__()
        self.moco = moco

    def forward(self, features: Tensor) -> Tensor:
        q = self.moco.query_of(features)
        return moco_loss(q, q.detach())


def counted(
    made: Callable[[], MoCo],
    method: str,
    side: int,
    *,
    chunk: int = CHUNK,
    ways: Any = WAYS,
    optimizer: str = "adamw",
    sizes: tuple[int, ...] = SIZES,
) -> Counted:
    """By way: the bytes of a step by its batch, and the bytes that an image saves.

    Args:
        made: builds the model on the meta device, in train mode.
        method: "plain", "checkpoint" or a preset of mesa_train.
        side: of the images in pixels.
        chunk: images of a trunk forward in the way "chunks"; default 64.
        ways: which of `WAYS`; default: all.
        optimizer: "adamw" (default) or "lars", which has one moment.
        sizes: batches at which the ways without chunks are counted; default: three. With one, the
            line begins at the gradients and the bfloat16 copies of the weights, which need no image.
    """
    moco = made()
    width = int(moco.base_encoder.num_features)  # type: ignore[arg-type]
    # LARS has one moment, as SGD has.
    moments = "sgd" if optimizer == "lars" else optimizer
    parts = parameters_of(View(moco), moments, 0, False)
    # The momentum encoder is in float32; the estimator counts frozen weights in bfloat16.
    parts = dataclasses.replace(parts, frozen_bytes=4 * parts.frozen)
    static = states("ddp", "none", parts, Cluster(1, 1 << 60, 1 << 60)).gpu
    views = 2 * 3 * side**2 * 4

    def total(of_batch: Callable[[int], int]) -> Callable[[int], int]:
        return lambda batch: static + views * batch + (of_batch(batch) if batch else 0)

    found: Counted = {}
    for way, kind in (("joint", Joint), ("by view", View)):
        if way in ways:
            whole = _activations(kind, made(), method, side, sizes)
            if len(sizes) == 1:
                start = (0, (4 + 2) * parts.trained)
                whole = dataclasses.replace(whole, points=(start, *whole.points))
            found[way] = (total(whole.bytes), whole.saved_per_image)
    if "chunks" in ways:
        trunk = _activations(Trunk, made(), method, side, (chunk,))
        heads = _activations(Heads, made(), method, side, HEAD_SIZES)

        def chunks(batch: int) -> int:
            # Features and their gradients, in float32. Trunk and heads do not overlap.
            cached = 2 * width * 4 * batch
            return max(trunk.bytes(min(batch, chunk)), heads.bytes(batch)) + cached

        found["chunks"] = (total(chunks), heads.saved_per_image)
    return found


def _activations(
    kind: type[nn.Module], moco: MoCo, method: str, side: int, sizes: tuple[int, ...]
) -> Activations:
    """The bytes of a step beside the model states, at several batches."""

    def inputs(batch: int) -> Any:
        images = torch.empty(batch, 3, side, side, device="meta")
        if kind is Heads:
            return torch.empty(batch, int(moco.base_encoder.num_features), device="meta")  # type: ignore[arg-type]
        return (images, images.clone()) if kind is Joint else images

    loaded = Loaded("moco", kind(moco), inputs(sizes[0]), sizes[0])
    return activations_of(loaded, sizes[0], method, True, sizes=sizes)


def largest_batch(bytes_of: Callable[[int], int], gib: float) -> int:
    """The largest batch on a card of so many GiB, with 2 GiB left free; 0 if no image fits."""
    budget = gib * GIB - RESERVE
    low, high = 0, 1
    while bytes_of(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle)
    return low
