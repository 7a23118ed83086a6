"""The command lines of `recipes/dense`: training, dry run and evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training import command_line
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.mistakes import in_one_line

from . import dry_run as plan
from . import fit as recipe
from . import pictures
from .config import Config, load, of_dict
from .run import BEST, DenseRun

_NAME = "dense"


def evaluate_from(
    run: Path | None = None,
    config: Path | None = None,
    weights: Path | None = None,
    changes: Sequence[str] = (),
    count: int = 0,
) -> None:
    """Evaluate weights, and print the scores as one line of JSON.

    Args:
        run: a run's folder.
        config: YAML file, without a run.
        weights: a safetensors file or the authors' .pth; default: the run's best.
        changes: `section.key=value`, any number.
        count: pictures to draw into `predictions.png` of the run's folder; default 0.
    Raises:
        SystemExit: a mistake of the user, with one line.
    """
    command_line.log_lines()
    with in_one_line(_NAME):
        if (run is None) == (config is None):
            raise ConfigError("give --run or --config")
        if run is not None:
            settings = recipe.load_run(run, changes)
            weights = weights or run / BEST
        else:
            assert config is not None
            settings = _validation_alone(load(config, changes))
        if weights is None:
            raise ConfigError("give --weights: a configuration names none to evaluate")
        model = dataclasses.replace(settings.model, weights=str(weights), pretrained=False)
        settings = of_dict(dataclasses.replace(settings, model=model).to_dict())
        prepared = recipe.prepare(settings)
        scores = prepared.evaluate()
        if count and prepared.main:
            pictures.draw(prepared, prepared.out / recipe.PREDICTIONS, count)
        prepared.accelerator.print(json.dumps({"weights": str(weights), **scores}))


def _validation_alone(config: Config) -> Config:
    """The configuration with COCO's or ADE20K's validation split for training too.

    Such a split names its own classes, so an evaluation needs no training pictures.
    """
    data = config.data
    if data.format not in ("coco", "ade"):
        return config
    val = data.val or ("val2017" if data.format == "coco" else "validation")
    same = dataclasses.replace(data, train=val, train_annotations=data.val_annotations)
    return dataclasses.replace(config, data=same)


def training() -> typer.Typer:
    """The command line of `recipes/dense/train.py`."""
    return command_line.script(
        command_line.TrainingCommand(
            _NAME,
            load,
            plan.report,
            recipe.prepare,
            recipe.resume,
            recipe.describe,
            _fit,
            "Train a detector or a segmenter",
        )
    )


def _fit(run: DenseRun) -> str:
    scores = recipe.fit(run)
    return "" if scores is None else recipe.shown(scores)


def evaluation() -> typer.Typer:
    """The command line of `recipes/dense/evaluate.py`."""

    def main(
        run: Annotated[Path | None, typer.Option(help="A run's folder.")] = None,
        config: Annotated[Path | None, typer.Option(help="YAML file, without a run.")] = None,
        weights: Annotated[Path | None, typer.Option(help="Default: the run's best.")] = None,
        set: command_line.Changes = [],  # noqa: B006
        pictures: Annotated[int, typer.Option(min=0, help="Pictures to draw.")] = 0,
    ) -> None:
        evaluate_from(run, config, weights, set, pictures)

    return command_line.application("Print the scores of weights as one line of JSON.", main)
