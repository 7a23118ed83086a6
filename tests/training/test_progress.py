"""The dashboard: a redrawn table on a terminal, a line per epoch elsewhere."""

import io

from rich.console import Console

from mesa_train.training.engine import EpochResult, StepEvent
from mesa_train.training.progress import Dashboard


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
