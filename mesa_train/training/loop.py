"""Training loop of the recipes: optimizer steps, reports, checkpoints, ends of epochs.

Why: recipes differ in their models, processes, data and files. The order of events in a run is the
same for all recipes. A recipe implements `TrainingRun`; this loop keeps the order.

How: after each step, these events follow in this order:

1. `tick`, for a progress line. It reads nothing from the device.
2. Every `log_every` steps, before a checkpoint and at the end of an epoch: the means since the last
   report go to `TrainingRun.accept`, which stops a run that diverged, and then to `report`.
3. Every `save_every` steps: a checkpoint. At the end of an epoch, `end_of_epoch` decides.

Cost: losses and norms are summed on the device. A report waits for the device once.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cadence:
    """The steps of a run, and how often it reports and saves.

    Attributes:
        steps: optimizer steps of the run.
        epoch: optimizer steps of an epoch. A run without epochs has one of all steps.
        log_every: optimizer steps between reports; default 1.
        save_every: optimizer steps between checkpoints in an epoch; default 0: none.
    """

    steps: int
    epoch: int
    log_every: int = 1
    save_every: int = 0


@dataclass(frozen=True)
class StepResult:
    """Means over the steps since the last report.

    Attributes:
        step: counts from 1.
        loss: mean loss over all processes.
        grad_norm: mean norm of the gradient before clipping.
        lr: learning rate of the last step.
        step_ms: mean time of a step in milliseconds, without checkpoints.
        wait_ms: the part of `step_ms` in which the step waited for its batches.
        steps: steps since the last report.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    step_ms: float
    wait_ms: float
    steps: int


class TrainingRun(abc.ABC):
    """A model in training, as the loop needs it.

    Attributes:
        cadence: steps, reports and checkpoints.
    """

    cadence: Cadence

    @property
    @abc.abstractmethod
    def done(self) -> int:
        """Optimizer steps done. A resumed run begins above 0."""

    @property
    @abc.abstractmethod
    def lr(self) -> float:
        """Learning rate of the last step."""

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.done // self.cadence.epoch

    @abc.abstractmethod
    def batches(self) -> Iterator[Any]:
        """Batches from the next step to the end of its epoch, or further."""

    @abc.abstractmethod
    def step(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor | float]:
        """Take one optimizer step, and count it in `done`.

        Args:
            batches: of this step and later ones. The step takes one for each micro-batch.
        Returns:
            (loss of this process, norm of the gradient). The loop reads them at the next report.
        """

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all processes. The default is for one process."""
        return loss

    def accept(self, result: StepResult) -> None:  # noqa: B027  most runs need no more
        """Called with the means before they are reported. Raises an error if the run diverged."""

    def save(self) -> Any:
        """Write a checkpoint. All processes take part."""
        raise TypeError(f"{type(self).__name__} has no checkpoints; save_every must be 0")


Report = Callable[[StepResult], None]


def train(
    run: TrainingRun,
    report: Report,
    *,
    tick: Callable[[int], None] | None = None,
    end_of_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train from `run.done` to the end of the run.

    Args:
        run: the model in training.
        report: called every `log_every` steps, before a checkpoint and at the end of an epoch.
        tick: called after every step with the number of steps since the last report.
        end_of_epoch: called with the epoch, from 1, and the mean time of its steps in milliseconds,
            checkpoints included. It evaluates and saves as the recipe needs.
    Raises:
        Exception: errors of `TrainingRun.step`, `accept` and `save`, and of the callbacks.
    """
    while run.done < run.cadence.steps:
        epoch, first, start = run.epoch + 1, run.done, time.perf_counter()
        train_epoch(run, report, tick)
        if end_of_epoch is not None:
            end_of_epoch(epoch, (time.perf_counter() - start) * 1e3 / (run.done - first))


def train_epoch(
    run: TrainingRun, report: Report, tick: Callable[[int], None] | None = None
) -> None:
    """Train from `run.done` to the end of the current epoch. The arguments are those of `train`."""
    cadence, batches = run.cadence, _Waiting(run.batches())
    end = min((run.epoch + 1) * cadence.epoch, cadence.steps)
    window = _Window(batches)
    while run.done < end:
        window.add(*run.step(batches))
        if tick is not None:
            tick(window.steps)
        saving = cadence.save_every > 0 and run.done % cadence.save_every == 0
        if run.done % cadence.log_every == 0 or saving or run.done == end:
            result = window.result(run)
            run.accept(result)
            report(result)
            if saving and run.done < end:
                run.save()
            window = _Window(batches)


def speed(images: int, step_ms: float, device: torch.device) -> dict[str, float]:
    """Columns of a row about a step: images_per_s, and on a GPU peak_bytes.

    Args:
        images: in a step, over all processes.
        step_ms: time of a step in milliseconds.
        device: of this process. `peak_bytes` is its peak of allocated memory since the start.
    """
    row: dict[str, float] = {"images_per_s": 1e3 * images / step_ms}
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


class _Waiting(Iterator[Any]):
    """Batches, and the seconds spent on waiting for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - start


class _Window:
    """Sums since the last report. They stay on the device until the report."""

    def __init__(self, batches: _Waiting) -> None:
        self.batches, self.waited = batches, batches.seconds
        self.loss: Any = 0.0
        self.norm: Tensor | float = 0.0
        self.steps, self.start = 0, time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor | float) -> None:
        """Add one step."""
        self.loss, self.norm, self.steps = self.loss + loss, self.norm + norm, self.steps + 1

    def result(self, run: TrainingRun) -> StepResult:
        """The means. Waits for the device and for the other processes."""
        steps = self.steps
        loss, norm = (run.mean(self.loss) / steps).item(), float(self.norm / steps)
        each = 1e3 / steps
        return StepResult(
            step=run.done,
            loss=loss,
            grad_norm=norm,
            lr=run.lr,
            step_ms=each * (time.perf_counter() - self.start),
            wait_ms=each * (self.batches.seconds - self.waited),
            steps=steps,
        )
