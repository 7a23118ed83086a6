"""The largest batch of MoCo v3 on one card, by method: counted on fake tensors, nothing is trained.

`mesa_train.training.moco.memory` has what is counted. One row for each model, way, method and card
goes to docs/results/moco_batch.jsonl.

    python scripts/bench/moco_batch.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm
import torch
import typer

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.models.moco import MoCo
from mesa_train.training.moco.memory import counted, largest_batch
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/moco_batch.jsonl"
METHODS = "plain,checkpoint,mesa8,mesa4,mesa8-recompute,mesa4-recompute"
SIDE = 224


def main(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "moco_vit_small,moco_vit_base",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = METHODS,
    cards: Annotated[str, typer.Option(help="GiB, comma-separated.")] = "12,24,48,80",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Count every model, way and method."""
    for name in models.split(","):
        for method in methods.split(","):
            found = counted(lambda: made(name), method, SIDE)  # noqa: B023  called at once
            for way, (held, saved) in found.items():
                for gib in map(int, cards.split(",")):
                    row = {
                        "model": name, "way": way, "method": method, "gib": gib,
                        "saved_per_image": saved, "states_bytes": held(0),
                        "largest_batch": largest_batch(held, gib),
                    }  # fmt: skip
                    records.append(out, {**row, **records.provenance()})
                    print(
                        f"{name} {way:8} {method:16} {gib} GiB: {row['largest_batch']}", flush=True
                    )


def made(name: str) -> MoCo:
    """The model on the meta device."""
    with torch.device("meta"):
        moco = MoCo(timm.create_model(name))
    return moco.train()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
