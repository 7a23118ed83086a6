"""The body of the recipes' training scripts: dry run, throughput, or a run from its configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training import command_line
from mesa_train.training.mistakes import in_one_line

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
    command_line.log_lines()
    with in_one_line(name):
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


def script(name: str) -> typer.Typer:
    """The command line of the recipe in `recipes/NAME`.

    Args:
        name: of the folder; it begins every error message.
    Returns:
        The application, which a training script calls.
    """

    def main(
        config: Annotated[Path, typer.Option(help=f"YAML file; recipes/{name} has some.")],
        set: command_line.Changes = [],  # noqa: B006
        resume: command_line.Resume = "",
        dry_run: command_line.DryRun = False,
        processes: command_line.Processes = 1,
        throughput: Annotated[
            bool, typer.Option("--throughput", help="Time steps and stop.")
        ] = False,
    ) -> None:
        train_from(
            config,
            set,
            resume=resume,
            dry_run=dry_run,
            processes=processes,
            throughput=throughput,
            name=name,
        )

    return command_line.application(f"Train a model; see recipes/{name}/README.md.", main)
