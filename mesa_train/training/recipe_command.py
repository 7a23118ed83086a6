"""From a configuration to the end of a run: rows, evaluations, curves, and the command line.

A run's folder holds `metrics.jsonl` (step and epoch rows), `curves.png`, the exported weights and
checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mesa_train.report import figures
from mesa_train.utils import records

from . import command_line, disk, recipe_run
from .accelerated_run import step_report
from .loop import StepResult, train
from .recipe_config import check_out
from .recipe_run import RecipeRun

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Recipe:
    """The functions and names of a recipe, for its command line.

    Attributes:
        name: of the folder under recipes.
        load: from a YAML file and `section.key=value` changes to a checked configuration.
        prepare: from a configuration and Accelerate's accelerator to a run.
        plan: text of a dry run, from a configuration and the number of processes.
        describe: one line about a run.
        metrics: names of scores; the curves show the first one that a run has.
    """

    name: str
    load: Callable[[Path, Sequence[str]], Any]
    prepare: Callable[[Any, Any], RecipeRun]
    plan: Callable[[Any, int], str]
    describe: Callable[[Any], str]
    metrics: tuple[str, ...]


def prepare(recipe: Recipe, config: Any) -> RecipeRun:
    """Check a configuration and build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together, or do not fit this machine.
    """
    from accelerate import Accelerator

    check_out(config.train.out)
    return recipe.prepare(config, Accelerator(cpu=config.train.device == "cpu"))


def fit(run: RecipeRun, recipe: Recipe) -> dict[str, float]:
    """Train to the end, write the weights and draw the curves.

    Returns:
        The scores of the last evaluation, by name.
    """
    config, metrics = run.config, run.out / METRICS
    scores: dict[str, float] = {}
    losses: list[tuple[float, int]] = []

    row_of = step_report(run, metrics)

    def report(result: StepResult) -> None:
        losses.append((result.loss, result.steps))
        row_of(result)

    def end_of_epoch(epoch: int, step_ms: float) -> None:
        mean = sum(loss * n for loss, n in losses) / max(1, sum(n for _, n in losses))
        losses.clear()
        if epoch % config.train.evaluate_every == 0 or epoch == config.train.epochs:
            scores.update(run.evaluate())
            if run.main:
                row = {"kind": "epoch", "step": run.done, "name": config.train.policy}
                row |= {"seed": config.train.seed, "epoch": epoch, "train_loss": mean}
                disk.append(metrics, {**row, **scores, "step_ms": step_ms})
                found = "".join(f", {name} {value:.4g}" for name, value in scores.items())
                print(f"epoch {epoch}: loss {mean:.4f}{found}", flush=True)  # noqa: T201
        run.save()

    train(run, report, end_of_epoch=end_of_epoch)
    run.export()
    if run.main:
        draw(metrics, run.out / "curves.png", recipe)
    return scores


def draw(metrics: Path, picture: Path, recipe: Recipe) -> None:
    """Draw the loss and the recipe's score."""
    rows = [row for row in records.read(metrics) if row["kind"] == "epoch"]
    if not rows:
        return
    canvas, (loss, score) = figures.figure(2, recipe.name)
    figures.curves(loss, rows, "train_loss", "training loss")
    for name in [name for name in recipe.metrics if name in rows[-1]][:1]:
        figures.curves(score, rows, name, name)
    figures.save(canvas, picture)


def script(recipe: Recipe) -> typer.Typer:
    """The command line of a recipe. Returns the application, which a training script calls."""

    def scores(run: RecipeRun) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in fit(run, recipe).items())

    return command_line.script(
        command_line.TrainingCommand(
            recipe.name,
            recipe.load,
            recipe.plan,
            lambda config: prepare(recipe, config),
            lambda run, how: recipe_run.resume(run, how, METRICS),
            recipe.describe,
            scores,
        )
    )
