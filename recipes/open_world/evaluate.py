"""Evaluate an open-world detector after its last task, and draw its detections.

    python recipes/open_world/evaluate.py --run runs/open_world_quickstart
    python recipes/open_world/evaluate.py --run runs/open_world_quickstart --energy two_fits
    python recipes/open_world/evaluate.py --run runs/open_world_quickstart --pictures FOLDER --out drawn

`--run` takes the configuration of the run's newest checkpoint and the weights `model.safetensors`.
`--config` and `--weights` name others.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.accelerated_run import WEIGHTS
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.mistakes import in_one_line
from mesa_train.training.open_world import evaluation, fit
from mesa_train.training.open_world.config import load

_ENERGIES = "kept: as in the weights; off; known_tail, two_fits or transductive: a new fit."


def main(
    run: Annotated[Path | None, typer.Option(help="A run's folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file, without a run.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Default: the run's.")] = None,
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    energy: Annotated[str, typer.Option(help=_ENERGIES)] = "kept",
    pictures: Annotated[Path | None, typer.Option(help="Draw these instead of a test.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the drawn pictures.")] = Path("drawn"),
) -> None:
    """Print the metrics of the test pictures, or draw the detections of a folder of pictures."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("open_world"):
        if (run is None) == (config is None):
            raise ConfigError("give --run or --config")
        if run is not None:
            settings, weights = fit.load_run(run, set), weights or run / WEIGHTS
        else:
            assert config is not None
            settings = load(config, set)
        if weights is None:
            raise ConfigError("give --weights: a configuration names none to evaluate")
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
