"""Training of a recipe from its configuration to its curves: check everything, build, train.

A run's folder holds `metrics.jsonl` (step and epoch rows), `curves.png`, `best.safetensors`, logs and checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mesa_train.report import figures as plots
from mesa_train.training import checkpoints, disk
from mesa_train.training.config_schema import ConfigError, changed
from mesa_train.training.data import sources
from mesa_train.training.data.loader import Batch, Loader
from mesa_train.training.loop import StepResult, speed, train
from mesa_train.training.progress import Dashboard, waiting
from mesa_train.training.trainer import EpochResult, StepEvent
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes

from . import dry_run as plan
from .accelerated import trackers
from .config import Config, check_files, of_dict
from .methods import method_of
from .run import CHECKPOINTS, Run
from .start import start_from as start_from
from .train_state import Scores

_log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


def dry_run(config: Config, world: int) -> str:
    """The text of a dry run.

    The data set is opened only if the configuration lacks classes or images.
    """
    classes, images = config.model.classes, config.data.train_images
    if classes is None or images is None:
        check_files(config)
        found = sources.load(config.data, classes)
        classes, images = found.classes, found.train.count
    plan.check_model(config, classes)
    return plan.report(config, classes, images, world)


def prepare(config: Config) -> Run:
    """Check a configuration and build a run that is ready to start.

    Raises:
        ConfigError: parts of the configuration do not fit together, or do not fit this machine.
    """
    from accelerate import PartialState

    check_files(config)
    method = method_of(config)
    method.check_files()
    plan.check_machine(config)
    transforms = sources.transforms(config.data, config.augment)
    plan.check_model(config, config.model.classes or 2)
    state = PartialState(cpu=plan.use_cpu(config))
    config = plan.shared(config, state.num_processes)
    with state.main_process_first():
        data = sources.load(config.data, config.model.classes)
    made = plan.plan(config, data.train.count, state.num_processes)
    torch.manual_seed(config.train.seed)
    model = plan.build_model(config, data.classes)
    if config.model.weights:
        method.load(model, Path(config.model.weights))
    loader = Loader(
        data,
        transforms,
        config.data,
        batch_size=config.train.micro_batch,
        seed=config.train.seed,
        steps_per_epoch=made.steps_per_epoch,
        accumulation=made.accumulation,
        rank=state.process_index,
        world=made.world,
        pin_memory=config.data.pin_memory and not plan.use_cpu(config),
    )
    return Run(config, model, made, loader, data.classes)


def beginning(config: Config, how: str) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint to continue from.

    Args:
        config: of the run.
        how: "auto" for the newest complete checkpoint, "" for a new run, or the path of a
            checkpoint.
    Returns:
        (checkpoint, its state), or None for a new run.
    Raises:
        ConfigError: there is no such checkpoint, or a new run would overwrite another.
    """
    if how not in ("", "auto"):
        if not Path(how).is_dir():
            raise ConfigError(f"--resume: no such checkpoint {how}")
        return Path(how), checkpoints.verify(Path(how))
    found = checkpoints.newest(Path(config.train.out) / CHECKPOINTS)
    if found is not None and not how:
        raise ConfigError(
            f"train.out={config.train.out} holds a run already: --resume auto continues it, or "
            "choose another folder"
        )
    return found


def resume(run: Run, how: str) -> bool:
    """Continue from the checkpoint that `how` names (see `beginning`).

    Returns:
        True if the run continues, False if it is new.
    """
    found, metrics = beginning(run.config, how), run.out / METRICS
    if found is not None:
        run.resume(*found)
    if run.accelerator.is_main_process:
        if found is None:
            metrics.unlink(missing_ok=True)
        elif metrics.exists():
            disk.forget_after(metrics, run.position.step)
    return found is not None


def fit(run: Run, saved_bytes: int) -> Scores | None:
    """Train to the end.

    Args:
        run: from `prepare`.
        saved_bytes: bytes saved for the backward of a micro-batch, for the records.
    Returns:
        The scores of the last epoch; None if no step was left.
    """
    config, main = run.config, run.accelerator.is_main_process
    metrics = run.out / METRICS
    scores = None
    if main:
        with _written(run):
            run.out.mkdir(parents=True, exist_ok=True)
    with _written(run), _view(run, saved_bytes) as view, trackers(config, run.accelerator) as track:

        def report(result: StepResult) -> None:
            row = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
            row |= speed(config.train.global_batch, result.step_ms, run.accelerator.device)
            track(row, result.step)
            if main:
                disk.append(metrics, {"kind": "step", "step": result.step} | row)
                event = StepEvent(config.train.policy, result.step, result.loss, result.step_ms)
                view.on_step(event, result.steps)

        def end_of_epoch(epoch: int, step_ms: float) -> None:
            nonlocal scores
            scores = run.evaluate(tick=lambda: view.alive("evaluating"))
            row = {
                "train_loss": run.position.loss / run.position.losses,
                "val_loss": scores.loss,
                "top1": scores.top1,
                "top5": scores.top5,
            }
            row |= run.method.scores(run)
            if run.ema is not None:
                row["ema_top1"] = (
                    averaged := run.evaluate(averaged=True, tick=lambda: view.alive("evaluating"))
                ).top1
            run.save_best(averaged if run.ema is not None else scores, run.ema is not None)
            track(row, run.done)
            if main:
                named = {"name": config.train.policy, "seed": config.train.seed, "epoch": epoch}
                line = {"kind": "epoch", "step": run.done, **named, **row}
                line |= {"step_ms": step_ms, "saved_bytes": saved_bytes}
                line |= {"skipped": run.position.skipped} if run.position.skipped else {}
                disk.append(metrics, line)
                view.on_epoch(
                    EpochResult(
                        config.train.policy, epoch, row["train_loss"], scores.loss, scores.top1,
                        step_ms, run.lr,
                    )
                )  # fmt: skip
            # Saved last: a process killed before this line repeats the end of the epoch, rows
            # included.
            run.position.loss, run.position.losses = 0.0, 0
            run.method.finish_epoch(run)
            run.save()

        if run.done == 0:
            run.method.begin(run)
        train(
            run,
            report,
            tick=lambda further: view.alive("training", further),
            end_of_epoch=end_of_epoch,
        )
    if main:
        with _written(run):
            draw(metrics, run.out / "curves.png", f"{config.model.name} on {config.data.source}")
    return scores


@contextlib.contextmanager
def _written(run: Run) -> Iterator[None]:
    """Turn a failed write of a run's files into one line with the last checkpoint.

    The files are metrics, trackers' files and curves.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or run.out
        raise checkpoints.CheckpointError(
            f"{where}: {error.strerror or error}; {run.last_good()}"
        ) from None


def throughput(run: Run, warm_up: int = 20, steps: int = 30) -> dict[str, float]:
    """Measure images per second and the median step time on random images. Saves nothing."""
    data, batch = run.config.data, run.config.train
    images = torch.randn(batch.micro_batch, 3, data.image_size, data.image_size)
    labels = torch.arange(batch.micro_batch) % run.classes

    def batches() -> Iterator[Batch]:
        while True:
            yield images, labels, []

    run.method.mode(run.model)
    times = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        loss, _ = run.step(batches())
        loss.item()
        times.append(1e3 * (time.perf_counter() - start))
    step_ms = statistics.median(times[warm_up:])
    return speed(batch.global_batch, step_ms, run.accelerator.device) | {"step_ms": step_ms}


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Draw the curves of a metrics file. Logs a warning if matplotlib is missing."""
    rows = [row for row in records.read(metrics) if row["kind"] == "epoch"]
    try:
        figure, (loss, held_out, accuracy) = plots.figure(3, title)
    except ImportError as error:
        _log.warning("no curves: %s", error)
        return
    plots.curves(loss, rows, "train_loss", "training loss")
    plots.curves(held_out, rows, "val_loss", "validation loss")
    plots.curves(accuracy, rows, "top1", "top-1 (%)", scale=100)
    plots.save(figure, picture)


def describe(run: Run, saved_bytes: int) -> str:
    """One line about a run that starts or continues."""
    train, made = run.config.train, run.plan
    return (
        f"{run.config.model.name} at {run.config.data.image_size} px, {train.policy}, "
        f"{plan.precision(run.config).name}: {plan.batches(run.config, made)}, steps {run.position.step} to "
        f"{made.steps}, keeps {format_bytes(saved_bytes)} a micro-batch"
    )


class _Silent:
    """Replaces the dashboard on all ranks but the first."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def on_step(self, event: StepEvent, steps: int = 1) -> None:
        pass

    def on_epoch(self, result: EpochResult) -> None:
        pass

    def alive(self, what: str, further: int = 0) -> None:
        pass


def preparing(run: Run, what: str) -> contextlib.AbstractContextManager[None]:
    """Context manager: show on the first rank that `what` is in progress."""
    if not run.accelerator.is_main_process:
        return contextlib.nullcontext()
    return waiting(what, Console(stderr=True))


def _view(run: Run, saved_bytes: int) -> Any:
    """The dashboard of a run on the first rank; a silent one on other ranks."""
    if not run.accelerator.is_main_process:
        return _Silent()
    view = Dashboard(
        describe(run, saved_bytes),
        {run.config.train.policy: saved_bytes},
        total_steps=run.plan.steps,
        batch_size=run.config.train.global_batch,
    )
    view.start_at(run.position.step)
    return view


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
