"""A dense run from its configuration to its curves and pictures.

A run's folder holds `metrics.jsonl` (step and epoch rows), `curves.png`, `predictions.png`,
`best.safetensors` and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mesa_train.report import figures
from mesa_train.training import accelerated_run, checkpoints, disk
from mesa_train.training.accelerated_run import step_report
from mesa_train.training.config_schema import ConfigError, changed
from mesa_train.training.loop import train
from mesa_train.utils import records

from . import dry_run, pictures
from .build import backbone_of, model_of, start_from, strides_of
from .config import Config, of_dict
from .run import CHECKPOINTS, DenseRun
from .tasks import Scores, task_of

METRICS, PREDICTIONS = "metrics.jsonl", "predictions.png"


def accelerator_of(config: Config) -> Any:
    """Accelerate's accelerator of a configuration for its processes (`dry_run.shared`)."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    train, cpu = config.train, dry_run.use_cpu(config)
    world = PartialState(cpu=cpu).num_processes
    steps = train.global_batch // (train.micro_batch * world)
    try:
        return Accelerator(
            cpu=cpu,
            mixed_precision=dry_run.precision(config).name,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=steps, sync_with_dataloader=False
            ),
            # Each process keeps its own batch norm statistics, as in the authors' training.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise ConfigError(f"train.precision={train.precision}: {error}") from None


def prepare(config: Config) -> DenseRun:
    """Check a configuration and build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together, or do not fit this machine.
    """
    from accelerate.state import PartialState

    config.check_files()
    dry_run.check_machine(config)
    plain = dataclasses.replace(config, model=_without_weights(config))
    backbone_of(plain, "meta", strides_of(config.model.kind))
    state = PartialState(cpu=dry_run.use_cpu(config))
    config = dry_run.shared(config, state.num_processes)
    with state.main_process_first():
        task = task_of(config)
    torch.manual_seed(config.train.seed)
    model = model_of(config, len(task.names))
    if config.model.weights:
        start_from(model, config)
    return DenseRun(config, task, model, accelerator_of(config))


def _without_weights(config: Config) -> Any:
    return dataclasses.replace(config.model, pretrained=False)


def resume(run: DenseRun, how: str) -> bool:
    """Continue a run.

    Args:
        run: from `prepare`.
        how: "auto" for the newest complete checkpoint, "" for a new run, or a checkpoint's path.
    Returns:
        True if the run continues.
    Raises:
        ConfigError: there is no such checkpoint, or a new run would overwrite another.
    """
    return accelerated_run.resume(run, how, METRICS)


def fit(run: DenseRun) -> Scores | None:
    """Train to the end.

    Returns:
        The last scores; None if no step was left.
    """
    config, metrics = run.config, run.out / METRICS
    named = {"name": config.train.policy, "seed": config.train.seed}
    last: Scores | None = None
    report = step_report(run, metrics)

    def end_of_epoch(_: int, step_ms: float) -> None:
        nonlocal last
        last = run.evaluate()
        run.save_best(last)
        epoch = round(run.done / run.loader.steps, 3)
        mean = run.loss_sum / max(1, run.losses)
        run.loss_sum, run.losses = 0.0, 0
        if run.main:
            line = {"kind": "epoch", "step": run.done, **named, "epoch": epoch}
            line |= {"train_loss": mean, "step_ms": step_ms, **last}
            disk.append(metrics, line)
            run.accelerator.print(f"epoch {epoch:g}: loss {mean:.3f}, {shown(last)}", flush=True)
            if config.train.pictures:
                pictures.draw(run, run.out / PREDICTIONS, config.train.pictures)
        # Saved last: a process killed before this line repeats the evaluation, rows included.
        run.save()

    train(run, report, end_of_epoch=end_of_epoch)
    if run.main:
        name = f"{config.model.kind} on {config.model.backbone}"
        draw(metrics, run.out / "curves.png", name, run.task.metric)
    return last


def shown(scores: Scores) -> str:
    """Scores as one text, in per cent."""
    named = [name for name in scores if "." not in name and not name.endswith(("small", "large"))]
    return ", ".join(f"{name} {scores[name]:.1%}" for name in named) or "no score"


def draw(metrics: Path, picture: Path, title: str, metric: str) -> None:
    """Draw the loss and the metric."""
    rows = [row for row in records.read(metrics) if row["kind"] == "epoch" and metric in row]
    if not rows:
        return
    canvas, (loss, score) = figures.figure(2, title)
    figures.curves(loss, rows, "train_loss", "training loss")
    figures.curves(score, rows, metric, f"{metric} (%)", scale=100)
    figures.save(canvas, picture)


def load_run(folder: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration of a run's newest checkpoint, with changes applied.

    Raises:
        ConfigError: the folder holds no checkpoint, or a change is wrong.
    """
    found = checkpoints.newest(folder / CHECKPOINTS)
    if found is None:
        raise ConfigError(f"{folder} holds no checkpoint")
    with disk.reading(found[0]):
        config = found[1]["config"]
    return of_dict(changed(config, [f"train.out={json.dumps(str(folder))}", *changes]))


def describe(run: DenseRun) -> str:
    """Lines about a run that starts or continues."""
    config = run.config
    return (
        f"{config.model.kind} on {config.model.backbone}, {config.train.policy}: "
        f"{len(run.task.groups)} training pictures, {run.task.count} for validation, "
        f"{len(run.task.names)} classes\n"
        f"{dry_run.batches(config, run.world)}, steps {run.done} to {run.cadence.steps}\n"
        f"{run.precision.line}"
    )
