"""The body of the recipes' training scripts: dry run, throughput, or a run from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mesa_train.training import disk

from . import dry_run as plan
from . import fit as recipe
from .config import load


def train_from(
    config: Path,
    changes: Sequence[str] = (),
    *,
    resume: str = "",
    dry_run: bool = False,
    processes: int = 1,
    throughput: bool = False,
    name: str = "litv2",
) -> None:
    """Train a model of a configuration, and print what happens.

    Args:
        config: YAML file.
        changes: `section.key=value`, any number.
        resume: "auto", the path of a checkpoint, or "" for a new run.
        dry_run: print the plan and stop.
        processes: of a dry run.
        throughput: time steps and stop.
        name: of the recipe, in its error messages; default "litv2".
    Raises:
        SystemExit: a mistake of the user, with one line.
    """
    try:
        settings = load(config, changes)
        if dry_run:
            print(recipe.dry_run(settings, processes))  # noqa: T201
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
        raise SystemExit(recipe.told_once(error, name)) from None
    except RuntimeError as error:
        if not disk.peer_ended(error):
            raise
        raise SystemExit(1) from None
