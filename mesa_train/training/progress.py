"""Live view of training runs: one line for each run, and one bar over all steps with the time left.

A terminal shows a table that is redrawn in place. Without a terminal (a log file, CI), every epoch
prints one line. Between epochs, a line every few seconds reports the step. Each line is flushed at
once.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mesa_train.utils.formatting import format_bytes

from .trainer import EpochResult, StepEvent

# Seconds between two lines if there is no terminal.
EVERY_S = 5.0


@contextlib.contextmanager
def waiting(what: str, console: Console | None = None) -> Iterator[None]:
    """Context manager: show that `what` is in progress.

    A terminal shows a spinner. Without one, a line is printed now and every few seconds.
    """
    console = console or Console()
    if console.is_terminal:
        with console.status(what):
            yield
        return
    console.print(what, highlight=False, soft_wrap=True)
    done, start = threading.Event(), time.monotonic()

    def speak() -> None:
        while not done.wait(EVERY_S):
            passed = clock(time.monotonic() - start)
            console.print(f"{what}: {passed}", highlight=False, soft_wrap=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Every:
    """Print a line on stderr if the last line is at least `EVERY_S` seconds old."""

    def __init__(self) -> None:
        self.spoken = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.spoken >= EVERY_S:
            self.spoken = time.monotonic()
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds, "3:07"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class _Line:
    """The recent losses and step times of one run, and its last epoch's result."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    times_ms: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    result: EpochResult | None = None


class Dashboard:
    """Context manager that shows runs by name while they report steps and epochs.

    Args:
        title: heading of the table.
        saved_bytes: bytes saved for the backward, by the run's name.
        total_steps: steps of all runs together.
        batch_size: images in a batch, to turn step times into images per second.
        console: rich console; default: stdout.
    """

    def __init__(
        self,
        title: str,
        saved_bytes: Mapping[str, int],
        *,
        total_steps: int,
        batch_size: int,
        console: Console | None = None,
    ) -> None:
        self.title = title
        self.saved_bytes = dict(saved_bytes)
        self.batch_size = batch_size
        self.console = console or Console()
        self.lines = {name: _Line() for name in saved_bytes}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps, elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=total_steps)
        self.live = Live(self._view(), console=self.console, auto_refresh=False)
        self.refreshed = 0.0
        self.started = self.spoken = self.progress.get_time()
        self.skipped = 0.0

    def start_at(self, step: int) -> None:
        """Set the number of steps that an earlier process has done."""
        self.progress.update(self.task, completed=step)
        self.skipped = step

    def alive(self, what: str, further: int = 0) -> None:
        """Without a terminal: print a line about the current work, if the last line is old enough.

        Args:
            what: the current work.
            further: steps since the last report.
        """
        now = self.progress.get_time()
        if self.console.is_terminal or now - self.spoken < EVERY_S:
            return
        self.spoken, passed = now, now - self.started
        task = self.progress.tasks[0]
        done = task.completed + further
        text = f"{what}  {done:.0f} of {task.total or 0:.0f} steps, {clock(passed)} elapsed"
        if (own := done - self.skipped) > 0:
            text += f", about {clock(passed / own * ((task.total or 0) - done))} left"
        self.console.print(text, highlight=False, soft_wrap=True)

    def restart(self, title: str) -> None:
        """Empty the table for the next runs with the same names. The bar keeps its position."""
        self.title = title
        self.lines = {name: _Line() for name in self.lines}
        if not self.console.is_terminal:
            self.console.print(title, highlight=False, soft_wrap=True)

    def __enter__(self) -> Dashboard:
        if self.console.is_terminal:
            self.live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.update(self._view(), refresh=True)
            self.live.stop()

    def on_step(self, event: StepEvent, steps: int = 1) -> None:
        """Show one step, or the mean of the last `steps` steps."""
        line = self.lines[event.name]
        line.losses.append(event.loss)
        line.times_ms.append(event.time_ms)
        self.progress.advance(self.task, steps)
        now = self.progress.get_time()
        if self.console.is_terminal and now - self.refreshed > 0.25:
            self.live.update(self._view(), refresh=True)
            self.refreshed = now
        rate = f"{event.time_ms:.0f} ms/step"
        self.alive(f"{event.name:<18} loss {statistics.fmean(line.losses):.3f}  {rate}")

    def on_epoch(self, result: EpochResult) -> None:
        """Show the result of an epoch."""
        self.lines[result.name].result = result
        if not self.console.is_terminal:
            self.spoken = self.progress.get_time()
            self.console.print(
                f"{result.name:<18} epoch {result.epoch:>3}  loss {result.train_loss:.3f}  "
                f"held-out accuracy {result.val_accuracy:6.1%}  {result.step_ms:.0f} ms/step  "
                f"{self._images_per_s(result.step_ms):.0f} images/s  "
                f"keeps {format_bytes(self.saved_bytes[result.name])}",
                highlight=False,
                soft_wrap=True,
            )

    def _images_per_s(self, step_ms: float) -> float:
        """Images per second at a step time in milliseconds."""
        return 1e3 * self.batch_size / step_ms

    def _view(self) -> Group:
        """The table of all runs and the bar."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("run", "saved for\nbackward", "step", "images/s", "epoch"):
            table.add_column(heading, justify="left" if heading == "run" else "right")
        for heading in ("training\nloss", "held-out\naccuracy"):
            table.add_column(heading, justify="right", min_width=9)
        for name, line in self.lines.items():
            cells = [name, format_bytes(self.saved_bytes[name])]
            if line.losses:
                step_ms = statistics.median(line.times_ms)
                cells += [f"{step_ms:.0f} ms", f"{self._images_per_s(step_ms):.0f}"]
            else:
                cells += ["-", "-"]
            result = line.result
            cells += ["-" if result is None else str(result.epoch)]
            cells += [f"{statistics.fmean(line.losses):.3f}" if line.losses else "-"]
            cells += ["-" if result is None else f"{result.val_accuracy:.1%}"]
            table.add_row(*cells)
        return Group(table, self.progress)
