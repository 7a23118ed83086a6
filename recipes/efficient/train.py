"""Training of HVT, DynamicViT, EcoFormer and SPViT from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/efficient/train.py \\
        --config recipes/efficient/hvt_quickstart.yaml --set train.policy=mesa4

`--dry-run` prints the plan (steps, parameter groups, predicted memory) and stops.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.classification.command import train_from


def main(
    config: Annotated[Path, typer.Option(help="YAML file; recipes/efficient has some.")],
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    resume: Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of a dry run.")] = 1,
    throughput: Annotated[bool, typer.Option("--throughput", help="Time steps and stop.")] = False,
) -> None:
    """Train a model; see recipes/efficient/README.md."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    train_from(
        config,
        set,
        resume=resume,
        dry_run=dry_run,
        processes=processes,
        throughput=throughput,
        name="efficient",
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
