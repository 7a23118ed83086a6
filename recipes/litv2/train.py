"""Training of LITv2, or of any timm model, from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/litv2/train.py \\
        --config recipes/litv2/quickstart.yaml --set train.policy=mesa4

`--dry-run` prints the plan (steps, parameter groups, predicted memory) and stops.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training import disk
from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import load


def main(
    config: Annotated[Path, typer.Option(help="YAML file; recipes/litv2 has some.")],
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    resume: Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of a dry run.")] = 1,
    throughput: Annotated[bool, typer.Option("--throughput", help="Time steps and stop.")] = False,
) -> None:
    """Train a model; see recipes/litv2/README.md."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        settings = load(config, set)
        if dry_run:
            print(recipe.dry_run(settings, processes))
            return
        if not throughput:
            recipe.beginning(settings, resume)
        run = recipe.prepare(settings)
        with recipe.preparing(run, "counting what a step keeps (the first use builds kernels)"):
            kept = plan.memory(run.config, run.classes)["activations"]
        if throughput:
            for name, value in recipe.throughput(run).items():
                run.accelerator.print(f"{name:<14} {value:,.1f}")
            return
        if recipe.resume(run, resume):
            run.accelerator.print(f"continues after step {run.position.step}")
        run.accelerator.print(recipe.describe(run, kept))
        run.accelerator.print(plan.precision(run.config).line)
        recipe.fit(run, kept)
        whose = " of the averaged weights" if run.ema is not None else ""
        run.accelerator.print(f"best top-1 {run.position.best:.2%}{whose}; all of it in {run.out}")
    except recipe.MISTAKES as error:
        raise SystemExit(recipe.told_once(error)) from None
    except RuntimeError as error:
        if not disk.peer_ended(error):
            raise
        raise SystemExit(1) from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
