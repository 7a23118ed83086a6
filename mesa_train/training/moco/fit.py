"""A run of MoCo v3 from its configuration to its curves.

A run's folder holds `metrics.jsonl` (step and epoch rows), `curves.png`, `encoder.safetensors` and
checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesa_train.report import figures
from mesa_train.training import disk, recipe_run
from mesa_train.training.accelerated_run import step_report
from mesa_train.training.data import sources
from mesa_train.training.loop import StepResult, train
from mesa_train.utils import records

from .config import Config
from .run import MocoRun

METRICS = "metrics.jsonl"


def prepare(config: Config) -> MocoRun:
    """Check a configuration and build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together, or do not fit this machine.
    """
    from accelerate import Accelerator

    config.check_files()
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    with accelerator.main_process_first():
        data = sources.load(config.data, None)
    return MocoRun(config, data, accelerator)


def resume(run: MocoRun, how: str) -> bool:
    """Continue a run; see `recipe_run.resume`."""
    return recipe_run.resume(run, how, METRICS)


def fit(run: MocoRun) -> float | None:
    """Train to the end.

    Returns:
        The last accuracy of nearest neighbours, 0 to 1; None if there was none.
    """
    config, metrics = run.config, run.out / METRICS
    named = {"name": config.train.policy, "seed": config.train.seed}
    last: list[float] = []
    losses: list[tuple[float, int]] = []

    def neighbours(epoch: int, **row: Any) -> None:
        if run.main:
            last.append(run.nearest_neighbours())
            line = {"kind": "epoch", "step": run.done, **named, "epoch": epoch, "knn": last[-1]}
            disk.append(metrics, line | row)
            run.accelerator.print(
                f"epoch {epoch}: " + (f"loss {row['train_loss']:.3f}, " if row else "")
                + f"nearest neighbours {last[-1]:.1%}",
                flush=True,
            )  # fmt: skip

    row_of = step_report(
        run, metrics, lambda result: {"cross_entropy": run.cross_entropy(result.loss)}
    )

    def report(result: StepResult) -> None:
        losses.append((result.loss, result.steps))
        row_of(result)

    def end_of_epoch(epoch: int, step_ms: float) -> None:
        every = config.train.knn_every
        if every and (epoch % every == 0 or epoch == config.train.epochs):
            mean = sum(loss * n for loss, n in losses) / max(1, sum(n for _, n in losses))
            neighbours(epoch, train_loss=mean, step_ms=step_ms)
        losses.clear()
        run.save()

    if run.done == 0 and config.train.knn_every:
        neighbours(0)
    train(run, report, end_of_epoch=end_of_epoch)
    run.export()
    if run.main:
        draw(metrics, run.out / "curves.png", f"{config.model.name} on {config.data.source}")
    return last[-1] if last else None


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Draw the loss and the accuracy of nearest neighbours."""
    rows = [row for row in records.read(metrics) if row["kind"] == "epoch"]
    if not rows:
        return
    canvas, (loss, accuracy) = figures.figure(2, title)
    trained = [row for row in rows if "train_loss" in row]
    if trained:
        figures.curves(loss, trained, "train_loss", "training loss")
    figures.curves(accuracy, rows, "knn", "nearest neighbours (%)", scale=100)
    figures.save(canvas, picture)
