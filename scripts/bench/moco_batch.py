"""The largest batch of MoCo v3 on one card, by method: counted on fake tensors, nothing is trained.

A step holds the model states (weights, gradients and AdamW's moments in float32, and the momentum
encoder), both views of the images in float32, and its activations under bfloat16 autocast. The ways:

- joint: both views' forwards, then one backward, as in the authors' step.
- by view: one view's forward and backward, then the other's (`backward_by_view`).
- chunks: the trunk of a view in chunks of 64 images, the heads on the full batch.

One row for each model, way, method and card goes to docs/results/moco_batch.jsonl.

    python scripts/bench/moco_batch.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.estimate.activations import Activations, activations_of
from mesa_train.estimate.estimator import RESERVE, parameters_of
from mesa_train.estimate.model_states import Cluster, states
from mesa_train.loading.model import Loaded
from mesa_train.models.moco import MoCo, moco_loss
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/moco_batch.jsonl"
GIB = 2**30
METHODS = "plain,checkpoint,mesa8,mesa4,mesa8-recompute,mesa4-recompute"
# The heads have a square of similarities, so their bytes are no line. A line between two points lies
# above the curve.
SIZES, HEAD_SIZES = (64, 4096, 16384), (64, 4096, 16384, 65536)
CHUNK, SIDE = 64, 224


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


def main(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "moco_vit_small,moco_vit_base",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = METHODS,
    cards: Annotated[str, typer.Option(help="GiB, comma-separated.")] = "12,24,48,80",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Count every model, way and method."""
    for name in models.split(","):
        for method in methods.split(","):
            for way, (held, saved) in counted(name, method).items():
                for gib in map(int, cards.split(",")):
                    row = {
                        "model": name, "way": way, "method": method, "gib": gib,
                        "saved_per_image": saved, "states_bytes": held(0),
                        "largest_batch": largest(held, gib * GIB - RESERVE),
                    }  # fmt: skip
                    records.append(out, {**row, **records.provenance()})
                    print(
                        f"{name} {way:8} {method:16} {gib} GiB: {row['largest_batch']}", flush=True
                    )


def counted(name: str, method: str) -> dict[str, tuple[Callable[[int], int], int]]:
    """By way: the bytes of a step by its batch, and the bytes that an image saves."""
    joint = activations(Joint, name, method, SIZES)
    view = activations(View, name, method, SIZES)
    trunk, heads = (
        activations(Trunk, name, method, (CHUNK,)),
        activations(Heads, name, method, HEAD_SIZES),
    )
    moco = made(name)
    width = int(moco.base_encoder.num_features)  # type: ignore[arg-type]
    parts = parameters_of(View(moco), "adamw", 0, False)
    # The momentum encoder is in float32; the estimator counts frozen weights in bfloat16.
    parts = dataclasses.replace(parts, frozen_bytes=4 * parts.frozen)
    static = states("ddp", "none", parts, Cluster(1, 1 << 60, 1 << 60)).gpu
    views = 2 * 3 * SIDE**2 * 4

    def chunks(batch: int) -> int:
        # Features and their gradients, in float32. Trunk and heads do not overlap.
        cached = 2 * width * 4 * batch
        return max(trunk.bytes(min(batch, CHUNK)), heads.bytes(batch)) + cached

    def total(of_batch: Callable[[int], int]) -> Callable[[int], int]:
        return lambda batch: static + views * batch + (of_batch(batch) if batch else 0)

    return {
        "joint": (total(joint.bytes), joint.saved_per_image),
        "by view": (total(view.bytes), view.saved_per_image),
        "chunks": (total(chunks), heads.saved_per_image),
    }


def activations(
    kind: type[nn.Module], name: str, method: str, sizes: tuple[int, ...]
) -> Activations:
    """The bytes of a step beside the model states, at several batches."""

    def inputs(batch: int) -> Any:
        images = torch.empty(batch, 3, SIDE, SIDE, device="meta")
        if kind is Heads:
            return torch.empty(batch, int(moco.base_encoder.num_features), device="meta")  # type: ignore[arg-type]
        return (images, images.clone()) if kind is Joint else images

    moco = made(name)
    loaded = Loaded(name, kind(moco), inputs(CHUNK), CHUNK)
    return activations_of(loaded, CHUNK, method, True, sizes=sizes)


def made(name: str) -> MoCo:
    """The model on the meta device."""
    with torch.device("meta"):
        moco = MoCo(timm.create_model(name))
    return moco.train()


def largest(bytes_of: Callable[[int], int], budget: int) -> int:
    """The largest batch whose bytes are at most the budget; 0 if not even one image fits."""
    low, high = 0, 1
    while bytes_of(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle)
    return low


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
