"""Self-supervised training of a ViT, or of any timm model, by MoCo v3 (arXiv 2104.02057).

    python recipes/mocov3/train.py --config recipes/mocov3/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml recipes/mocov3/train.py \\
        --config recipes/mocov3/mocov3_vit_small.yaml --set data.path=IMAGENET

Labels are read for the evaluation by nearest neighbours alone. `--dry-run` prints the plan, with the
largest batch by policy and card, and stops.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.mistakes import in_one_line
from mesa_train.training.moco import fit as recipe
from mesa_train.training.moco.config import load
from mesa_train.training.moco.run import describe, plan


def main(
    config: Annotated[Path, typer.Option(help="YAML file; recipes/mocov3 has some.")],
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    resume: Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of a dry run.")] = 1,
) -> None:
    """Train a model; see recipes/mocov3/README.md."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("mocov3"):
        settings = load(config, set)
        if dry_run:
            print(plan(settings, processes))
            return
        run = recipe.prepare(settings)
        if recipe.resume(run, resume):
            run.accelerator.print(f"continues after step {run.done}")
        run.accelerator.print(describe(run), flush=True)
        accuracy = recipe.fit(run)
        if accuracy is not None:
            run.accelerator.print(f"nearest neighbours {accuracy:.2%}; all of it in {run.out}")
        run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
