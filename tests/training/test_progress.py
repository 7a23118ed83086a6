"""The dashboard: a redrawn table on a terminal, a line per epoch elsewhere."""

import io
import threading
import time

from rich.console import Console

from mesa_train.training import progress
from mesa_train.training.progress import Dashboard
from mesa_train.training.trainer import EpochResult, StepEvent


def shown(*, terminal):
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=100, color_system=None, _environ={}
    )
    kept = {"plain": 4 * 2**20, "mesa8": 2**20}
    with Dashboard("title", kept, total_steps=2, batch_size=64, console=console) as dashboard:
        for name in kept:
            dashboard.on_step(StepEvent(name, step=1, loss=2.5, time_ms=100.0))
            dashboard.on_epoch(EpochResult(name, 1, 2.5, 2.0, 0.25, 100.0, 1e-3))
    return console.file.getvalue()


def test_terminal_shows_both_runs():
    text = shown(terminal=True)
    assert text.index("plain") < text.index("mesa8")
    for cell in ("4.0 MiB", "1.0 MiB", "100 ms", "640", "2.500", "25.0%", "2/2"):
        assert cell in text


def test_log_gets_a_line_per_epoch():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 2
    assert lines[0].split()[:3] == ["plain", "epoch", "1"]
    assert "25.0%" in lines[1]
    assert "keeps 1.0 MiB" in lines[1]


def test_a_log_gets_a_line_every_few_seconds_with_the_time_left(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=100, _environ={})
    now = [100.0]
    dashboard = Dashboard("t", {"mesa8": 2**20}, total_steps=200, batch_size=64, console=console)
    monkeypatch.setattr(dashboard.progress, "get_time", lambda: now[0])
    dashboard.start_at(100)
    dashboard.started = dashboard.spoken = 100.0
    for step in range(101, 121):
        now[0] += 1.0
        dashboard.on_step(StepEvent("mesa8", step, loss=2.5, time_ms=1000.0))
    now[0] += 4.0
    dashboard.alive("evaluating")
    now[0] += 1.0
    dashboard.alive("evaluating", further=5)
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        # A step a second, 100 steps to go; those before the start took no time of this run.
        "105 of 200 steps, 0:05 elapsed, about 1:35 left",
        "110 of 200 steps, 0:10 elapsed, about 1:30 left",
        "115 of 200 steps, 0:15 elapsed, about 1:25 left",
        "120 of 200 steps, 0:20 elapsed, about 1:20 left",
        "125 of 200 steps, 0:25 elapsed, about 1:15 left",
    ]
    assert "loss 2.500  1000 ms/step" in lines[0]
    assert lines[-1].startswith("evaluating")


def test_waiting_speaks_until_it_is_over(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=100, _environ={})
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    with progress.waiting("building", console):
        deadline = time.monotonic() + 60
        while console.file.getvalue().count("building") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["building", "building: 0:00"]
    time.sleep(0.05)
    assert console.file.getvalue().splitlines() == lines


def test_no_thread_redraws_beside_the_training():
    """A loader forks its workers, and a fork of a process with threads may hang."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    before = threading.active_count()
    with Dashboard("t", {"mesa8": 2**20}, total_steps=2, batch_size=64, console=console):
        assert threading.active_count() == before
