"""Evaluate an open-world detector after its last task, and draw its detections.

    python recipes/open_world/evaluate.py --config recipes/open_world/quickstart.yaml \\
        --weights runs/open_world_quickstart/model.safetensors --energy known_tail

    python recipes/open_world/evaluate.py --config ... --weights ... --pictures FOLDER --out drawn
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.mistakes import in_one_line
from mesa_train.training.open_world import evaluation
from mesa_train.training.open_world.config import load


def main(
    config: Annotated[Path, typer.Option(help="The run's YAML file.")],
    weights: Annotated[Path, typer.Option(help="model.safetensors of a run.")],
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    energy: Annotated[str, typer.Option(help="kept: as in the weights; off: none.")] = "kept",
    pictures: Annotated[Path | None, typer.Option(help="Draw these instead of a test.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the drawn pictures.")] = Path("drawn"),
) -> None:
    """Print the metrics of the test pictures, or draw the detections of a folder of pictures."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("open_world"):
        if energy not in ("kept", "off"):
            raise ConfigError(f"--energy must be one of kept, off, got {energy!r}")
        settings = load(config, set)
        if pictures is not None:
            count = evaluation.draw_folder(settings, weights, pictures, out, energy=energy)
            print(f"{count} pictures in {out}")
            return
        for name, value in evaluation.scores(settings, weights, energy=energy).items():
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{name:<22} {text}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
