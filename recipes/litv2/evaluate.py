"""Evaluation on a data set of a run's best weights, a safetensors file or an official checkpoint.

python recipes/litv2/evaluate.py --run runs/litv2_quickstart
python recipes/litv2/evaluate.py --config recipes/litv2/litv2_s_imagenet.yaml --weights litv2_s.pth
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import load, of_dict
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.mistakes import in_one_line


def main(
    run: Annotated[Path | None, typer.Option(help="A run's folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file, without a run.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Default: the run's best.")] = None,
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
) -> None:
    """Print top-1, top-5 and the loss as one line of JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("litv2"):
        if (run is None) == (config is None):
            raise ConfigError("give --run or --config")
        if run is not None:
            settings = recipe.load_run(run, set)
            weights = weights or run / "best.safetensors"
        else:
            assert config is not None
            settings = load(config, set)
        if weights is None:
            raise ConfigError("give --weights: a configuration names none to evaluate")
        model = dataclasses.replace(settings.model, weights=str(weights))
        settings = of_dict(dataclasses.replace(settings, model=model).to_dict())
        prepared = recipe.prepare(settings)
        scores = dataclasses.asdict(prepared.evaluate())
        prepared.accelerator.print(json.dumps({"weights": str(weights), **scores}))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
