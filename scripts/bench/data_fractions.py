"""Segmentation on 1/16, 1/8, 1/4, 1/2 and all of the training pictures, as ViT-22B was measured.

All runs have the same number of crops: a fraction f repeats its pictures 1/f times in an epoch. Larger
fractions contain the smaller ones. A row for each goes to docs/results/data_fractions.jsonl.

    python scripts/bench/data_fractions.py
    python scripts/bench/data_fractions.py --config recipes/decoders/ade20k_linear.yaml --changes ""
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import quickstarts as common
import typer

from mesa_train.training.decoders.config import load
from mesa_train.training.decoders.data import sizes
from mesa_train.utils import records

RESULTS = common.ROOT / "docs/results/data_fractions.jsonl"
RECIPE = common.ROOT / "recipes/decoders"
FRACTIONS = "0.0625,0.125,0.25,0.5,1"
# A run of about two minutes of one core.
SMALL = "data.pictures=320 train.epochs=4 train.evaluate_every=4"


def main(
    config: Annotated[Path, typer.Option(help="A segmentation.")] = RECIPE
    / "quickstart_segmentation.yaml",
    fractions: Annotated[str, typer.Option(help="Comma-separated.")] = FRACTIONS,
    changes: Annotated[str, typer.Option(help="section.key=value, with spaces between.")] = SMALL,
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/fractions"),
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Train on each fraction and append a row."""
    work.mkdir(parents=True, exist_ok=True)
    for fraction in map(float, fractions.split(",")):
        row = measured(config, fraction, changes.split(), work)
        records.append(out, {**row, **records.provenance()})
        print(f"{fraction:g}: mean IoU {row['mean_iou']:.4f}", flush=True)


def measured(config: Path, fraction: float, changes: list[str], work: Path) -> records.Row:
    """Train on a fraction, or continue. Returns the row without its origin."""
    folder = work / f"fraction_{fraction:g}"
    changes = [*changes, f"data.fraction={fraction:g}", f"data.repeats={round(1 / fraction)}"]
    # Of this machine, so not in the row.
    places = [f"train.out={folder}"]
    if load(config, changes).data.source == "composed":
        places.append(f"data.path={work / 'pictures'}")
    pictures, *_ = sizes(load(config, [*changes, *places]).data)
    sets = [x for change in (*changes, *places) for x in ("--set", change)]
    command = [sys.executable, str(RECIPE / "train.py"), "--config", str(config), *sets]
    before = common.processor_seconds()
    if not (folder / "curves.png").exists():
        common.run([*command, "--resume", "auto"], Path.cwd())
    last = common.of_kind(folder, "epoch")[-1]
    scores = ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_iou_of_commonest")
    return {
        "file": config.name,
        "changes": changes,
        "fraction": fraction,
        "pictures": pictures,
        "policy": last["name"],
        "seed": last["seed"],
        "epochs": last["epoch"],
        "steps": last["step"],
        **{name: last[name] for name in scores},
        "processor_s": round(common.processor_seconds() - before, 1),
    }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
