"""Open-world detection (ORE, arXiv 2103.02603): tasks in turn, replay, evaluation, pictures.

    python recipes/open_world/train.py --config recipes/open_world/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml recipes/open_world/train.py \\
        --config recipes/open_world/owod_litv2_s.yaml --set data.lists=LISTS --set data.coco=COCO ...
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.mistakes import in_one_line
from mesa_train.training.open_world import fit as recipe
from mesa_train.training.open_world.config import load
from mesa_train.training.open_world.run import describe


def main(
    config: Annotated[Path, typer.Option(help="YAML file; recipes/open_world has some.")],
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    resume: Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")] = "",
) -> None:
    """Train a detector over all tasks; see recipes/open_world/README.md."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("open_world"):
        run = recipe.prepare(load(config, set))
        if recipe.resume(run, resume):
            run.accelerator.print(f"continues after step {run.done}")
        run.accelerator.print(describe(run), flush=True)
        recipe.fit(run)
        run.accelerator.print(f"all of it in {run.out}")
        run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
