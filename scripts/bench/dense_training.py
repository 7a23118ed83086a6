"""Training of the dense quickstarts, plain against mesa8, over seeds.

Each finished run appends a row to docs/results/dense_training.jsonl. A run that was stopped is
continued, and a run with a row of the same settings is left out, so the script may be started again
and again.

    python scripts/bench/dense_training.py
    python scripts/bench/dense_training.py --tasks segmentation --seeds 1
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mesa_train.measure.footprint import footprint
from mesa_train.training.checkpoints import newest
from mesa_train.training.dense import fit as recipe
from mesa_train.training.dense.config import Config, load
from mesa_train.training.dense.memory import step_of, worst_shape
from mesa_train.training.dense.run import CHECKPOINTS
from mesa_train.utils import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/dense_training.jsonl"


def settings(task: str, policy: str, seed: int, runs: Path) -> Config:
    """The configuration of one run of a quickstart."""
    out = runs / f"{task}_{policy}_{seed}"
    return load(
        ROOT / f"recipes/dense/quickstart_{task}.yaml",
        [
            f"train.policy={policy}",
            f"train.seed={seed}",
            f"train.out={out}",
            f"data.path={runs / f'data_{task}'}",
            "train.save_every=40",
            "train.pictures=0",
        ],
    )


def digest(config: Config) -> str:
    """A number of the settings of a run, its folders left out."""
    values = config.to_dict()
    del values["train"]["out"], values["data"]["path"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def saved_bytes(config: Config, classes: int) -> int:
    """Bytes saved for the backward of a micro-batch, counted on fake tensors."""
    from mesa_train.training.dense.build import model_of

    step, inputs = step_of(
        model_of(config, classes).train(), config.train.micro_batch, worst_shape(config)
    )
    return footprint(step, inputs, policy=config.train.policy, fake=True).saved_bytes


def trained(config: Config) -> dict[str, Any]:
    """Train to the end, or continue, and give the last scores and losses."""
    run = recipe.prepare(config)
    recipe.resume(run, "auto" if newest(run.out / CHECKPOINTS) else "")
    recipe.fit(run)
    rows = list(records.read(run.out / recipe.METRICS))
    epochs = [row for row in rows if row["kind"] == "epoch"]
    kept = ("ap", "ap50", "miou", "pixel_accuracy", "train_loss")
    return {
        **{key: epochs[-1][key] for key in kept if key in epochs[-1]},
        "steps": run.done,
        "pictures": len(run.task.groups),
        "held_out": run.task.count,
        "saved_bytes": saved_bytes(config, len(run.task.names)),
    }


def main(
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "segmentation,detection",
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = "plain,mesa8",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds from 0.")] = 3,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/dense_training"),
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Train what has no row yet."""
    torch.set_num_threads(1)
    rows = list(records.read(out)) if out.is_file() else []
    done = {row.get("settings") for row in rows}
    for task in tasks.split(","):
        for seed in range(seeds):
            for policy in policies.split(","):
                config = settings(task, policy, seed, runs)
                if digest(config) in done:
                    continue
                row = {"task": task, "policy": policy, "seed": seed, "settings": digest(config)}
                row |= trained(config)
                records.append(out, {**row, **records.provenance()})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
