"""The command line of recipes/mocov3: training without labels, linear evaluation and fine-tuning.

A configuration file with a section `method` is one of classification (`method.name=linear` or
`finetune`). All other files train without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training import command_line
from mesa_train.training.classification import command as classification
from mesa_train.training.command_line import TrainingCommand
from mesa_train.training.config_schema import read_yaml
from mesa_train.training.mistakes import in_one_line

from . import fit as recipe
from .config import load
from .run import MocoRun, describe, plan

NAME = "mocov3"


def fit(run: MocoRun) -> str:
    """Train to the end. Returns the last accuracy as text."""
    accuracy = recipe.fit(run)
    return "" if accuracy is None else f"nearest neighbours {accuracy:.2%}"


COMMAND = TrainingCommand(NAME, load, plan, recipe.prepare, recipe.resume, describe, fit)


def train_from(
    config: Path,
    changes: Sequence[str] = (),
    *,
    resume: str = "",
    dry_run: bool = False,
    processes: int = 1,
) -> None:
    """Train as a configuration says, and print what happens.

    Args:
        config: YAML file; with a section `method` it is one of classification.
        changes: `section.key=value`, any number.
        resume: "auto", the path of a checkpoint, or "" for a new run.
        dry_run: print the plan and stop.
        processes: of a dry run.
    Raises:
        SystemExit: a mistake of the user, with one line.
    """
    with in_one_line(NAME):
        labelled = "method" in read_yaml(config)
    if labelled:
        classification.train_from(
            config, changes, resume=resume, dry_run=dry_run, processes=processes, name=NAME
        )
    else:
        command_line.train_from(
            COMMAND, config, changes, resume=resume, dry_run=dry_run, processes=processes
        )


def script() -> typer.Typer:
    """The command line. Returns the application, which the training script calls."""

    def main(
        config: Annotated[Path, typer.Option(help="YAML file; recipes/mocov3 has some.")],
        set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
        resume: Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")] = "",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print the plan and stop.")
        ] = False,
        processes: Annotated[int, typer.Option(min=1, help="Processes of a dry run.")] = 1,
    ) -> None:
        train_from(config, set, resume=resume, dry_run=dry_run, processes=processes)

    return command_line.application(
        "Train, evaluate or fine-tune an encoder; see recipes/mocov3/README.md.", main
    )
