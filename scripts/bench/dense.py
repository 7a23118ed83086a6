"""Saved bytes of detection and segmentation, plain against presets, counted on fake tensors.

One row for each model, backbone and method goes to docs/results/dense.jsonl.

    python scripts/bench/dense.py
    python scripts/bench/dense.py --models retinanet --backbones litv2_s
    python scripts/bench/dense.py --models retinanet --backbones resnet50 --dtype bfloat16

`litv2_s:w4` is LITv2-S with windows of 4 in its third stage. Without `--models` and `--backbones`, the
pairs of `PAIRS` are counted.

Fake tensors have no values, so steps with shapes that depend on values get fixed shapes: an R-CNN
has 512 sampled regions per image, 128 of them positive, a quarter on each level, and 256 anchors per
image, half of them positive. The proposals themselves need no gradient and save nothing. The
clustering loss of `open_world_rcnn` is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import nn

from mesa_train.measure.footprint import Footprint, footprint
from mesa_train.models.dense import faster_rcnn, mask_rcnn, retinanet, semantic_fpn
from mesa_train.models.dense.named import timm_body
from mesa_train.models.open_world import open_world_rcnn
from mesa_train.training.dense.memory import RegionStep, RetinaNetStep
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/dense.jsonl"
# "+loss" also computes the loss again in the backward.
METHODS = "plain,mesa8,mesa4,mesa8-recompute,mesa8-recompute+loss,checkpoint,checkpoint+loss"
SIZES = {
    "retinanet": (800, 1280),
    "mask_rcnn": (800, 1280),
    "semantic_fpn": (512, 512),
    "faster_rcnn": (800, 1280),
    "open_world_rcnn": (800, 1280),
}
BACKBONES = ("litv2_s", "litv2_m", "litv2_b", "vit_base_patch16_224")
PAIRS = [
    *((model, name) for model in ("retinanet", "mask_rcnn", "semantic_fpn") for name in BACKBONES),
    ("mask_rcnn", "litv2_s:w4"),
    ("faster_rcnn", "litv2_s"),
    ("open_world_rcnn", "litv2_s"),
]
_REGIONS: dict[str, Callable[[Any], nn.Module]] = {
    "mask_rcnn": mask_rcnn,
    "faster_rcnn": faster_rcnn,
    "open_world_rcnn": open_world_rcnn,
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def body_of(backbone: str) -> Any:
    """A backbone of a timm name, with `:wN` for LITv2's window N."""
    name, _, window = backbone.partition(":w")
    windows: dict[str, Any] = {"windows": (0, 0, int(window), 1)} if window else {}
    return timm_body(name, **windows)


def step_of(name: str, backbone: str, batch: int, size: tuple[int, int]) -> tuple[nn.Module, Any]:
    """A module whose outputs are the losses, and its inputs."""
    body = body_of(backbone)
    images = torch.zeros(batch, 3, *size)
    if name == "semantic_fpn":
        return semantic_fpn(body).train(), [images, torch.zeros(batch, *size, dtype=torch.int64)]
    if name in _REGIONS:
        return RegionStep(_REGIONS[name](body)).train(), [images]
    target = {"boxes": torch.tensor([[0.0, 0, 64, 64]] * 8), "labels": torch.arange(8)}
    return RetinaNetStep(retinanet(body)).train(), [images, [target] * batch]


def parts(count: Footprint) -> dict[str, int]:
    """Bytes of the body, of the neck, and of the head with the loss."""
    sums = {"body": 0, "neck": 0, "head": 0}
    for module, size in count.by_module.items():
        name = module.removeprefix("model.")
        part = "body" if name.startswith("backbone.body") else "neck"
        sums[part if name.startswith("backbone.") else "head"] += size
    return sums


def chosen(models: str, backbones: str) -> list[tuple[str, str]]:
    """The pairs of comma-separated models and backbones; an empty text stands for those of PAIRS."""
    names = models.split(",") if models else list(SIZES)
    if unknown := [name for name in names if name not in SIZES]:
        raise SystemExit(f"dense: no model {unknown[0]!r}; choose from {', '.join(SIZES)}")
    if backbones:
        return [(name, backbone) for name in names for backbone in backbones.split(",")]
    return [pair for pair in PAIRS if pair[0] in names]


def main(
    models: Annotated[str, typer.Option(help="Comma-separated; default: those of PAIRS.")] = "",
    backbones: Annotated[
        str, typer.Option(help="Comma-separated timm names; default: those of PAIRS.")
    ] = "",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = METHODS,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16 or float16 of autocast.")
    ] = "float32",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Count every model with every method."""
    if dtype not in DTYPES:
        raise SystemExit(f"dense: no dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    for name, backbone in track(chosen(models, backbones), description="dense"):
        height, width = SIZES[name]
        step, inputs = step_of(name, backbone, batch_size, (height, width))
        common = {"model": name, "backbone": backbone, "batch_size": batch_size}
        common |= {"height": height, "width": width, "dtype": dtype}
        origin = records.provenance()
        losses: list[Any] = [m for m in step.modules() if hasattr(m, "recompute_loss")]
        for method in methods.split(","):
            policy, _, loss = method.partition("+")
            if loss and not losses:
                continue
            for module in losses:
                module.recompute_loss = bool(loss)
            count = footprint(step, inputs, policy=policy, autocast=DTYPES[dtype], fake=True)
            row = {"method": method, "saved_bytes": count.saved_bytes, "parts": parts(count)}
            records.append(out, {**common, **row, **origin})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
