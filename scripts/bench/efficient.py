"""Saved bytes of the efficient models, for each preset, counted on fake tensors.

A model is in its training form: DynamicViT masks its tokens, SPViT's search has all branches. One row
for each model and precision goes to docs/results/efficient.jsonl. Nothing is computed, so the counts are
the same on every machine.

    python scripts/bench/efficient.py
    python scripts/bench/efficient.py --models hvt_ti_1,spvit_deit_ti:search --precisions bf16
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import mesa_train
import mesa_train.models
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/efficient.jsonl"
SEARCH = ":search"
MODELS = (
    *["hvt_ti_1", *[f"hvt_s_{pools}" for pools in range(5)]],
    *[f"dynamicvit_{name}" for name in ("deit_256", "deit_s", "lvvit_s", "lvvit_m")],
    *["dynamicvit_convnext_t", "dynamicvit_swin_t"],
    *[f"ecoformer_pvt_v2_b{size}" for size in range(5)],
    "ecoformer_twins_svt_s",
    *[f"spvit_{name}" for name in ("deit_ti", "deit_s", "deit_b", "swin_t", "swin_s")],
    *[f"spvit_{name}{SEARCH}" for name in ("deit_ti", "deit_s", "swin_t")],
)
METHODS = ("plain", "mesa8", "mesa4", "mesa8-recompute")
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated; `:search` for SPViT's search.")
    ] = ",".join(MODELS),
    precisions: Annotated[str, typer.Option(help="Comma-separated: float32, bf16.")] = ",".join(
        PRECISIONS
    ),
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    image_size: Annotated[int, typer.Option(min=32)] = 224,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Count every model under every preset and append a row for each."""
    chosen = [name.strip() for name in precisions.split(",")]
    if unknown := [name for name in chosen if name not in PRECISIONS]:
        raise SystemExit(
            f"efficient: --precisions: no precision {unknown[0]}; choose from {', '.join(PRECISIONS)}"
        )
    for name in track([name.strip() for name in models.split(",")], description="counting"):
        for precision in chosen:
            row = {"model": name, "precision": precision, "batch_size": batch_size}
            row |= {"image_size": image_size}
            row |= counted(name, batch_size, image_size, PRECISIONS[precision])
            records.append(out, {**row, **records.provenance()})


def counted(name: str, batch: int, size: int, autocast: torch.dtype | None) -> dict[str, Any]:
    """The bytes of a model that its forward and cross entropy save, by method."""
    model = build(name)
    images = torch.empty(batch, 3, size, size, device="meta")

    def loss(output: Any) -> Tensor:
        return -getattr(output, "logits", output).float().log_softmax(-1).mean()

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "saved_bytes": {
            method: mesa_train.footprint(
                model, images, policy=method, autocast=autocast, loss=loss
            ).saved_bytes
            for method in METHODS
        },
    }


def build(name: str) -> nn.Module:
    """A model on the meta device, in training mode. SystemExit for an unknown name."""
    options = {"search": True} if name.endswith(SEARCH) else {}
    name = name.removesuffix(SEARCH)
    if not timm.is_model(name):
        raise SystemExit(f"efficient: --models: no model {name}")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **options)
    return model.train()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
