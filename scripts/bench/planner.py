"""Benchmark of the planner: predictions of `plan` against measured steps.

The script covers models of several families and several budgets.

One row for each model and budget goes to docs/results/plans.jsonl. A budget is a share: 0 is the
smallest reachable peak, 1 is plain's peak. Times are forward plus backward; plain and the plan take
turns.

    python scripts/bench/planner.py
    python scripts/bench/planner.py --models swin_tiny_patch4_window7_224 --batch-size 4
    python scripts/bench/planner.py --dtype float32      for a processor without bfloat16
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from mesa_train.loading.model import load
from mesa_train.measure.footprint import footprint
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.step import default_loss, relative_error
from mesa_train.methods.apply import PLAIN
from mesa_train.planner.plan import Plan
from mesa_train.planner.planner import Planner
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/plans.jsonl"
MODELS = (
    "vit_tiny_patch16_224,deit3_small_patch16_224,swin_tiny_patch4_window7_224,pvt_v2_b0,"
    "convnext_atto,hf:vit"
)
DTYPES = {"bf16": torch.bfloat16, "float32": None}


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, as for mesa-train compare.")
    ] = MODELS,
    shares: Annotated[str, typer.Option(help="Budgets, comma-separated.")] = "0,0.1,0.3,0.6",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Plan, run and compare."""
    if dtype not in DTYPES:
        raise SystemExit(f"planner: unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    autocast, console = DTYPES[dtype], Console()
    for name in models.split(","):
        loaded = load(name, batch_size=batch_size)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=None)

            def report(step: str, done: int, total: int, task: object = task) -> None:
                progress.update(task, description=step, completed=done, total=total)  # type: ignore[arg-type]

            planner = Planner.of(loaded.model, loaded.inputs, autocast=autocast, progress=report)
            runs = StepRunner(loaded.model, loaded.inputs, autocast, default_loss)
            exact = runs.reference()
            low, high = None, planner.plain.peak_bytes
            for share in map(float, shares.split(",")):
                if low is None or share == 0:
                    smallest = planner.plan()
                    low = smallest.prediction.peak_bytes
                budget = int(low + share * (high - low))
                plan = smallest if share == 0 else planner.plan(budget)
                row = measured(planner, runs, plan, exact, rounds)
                setting = {
                    "model": name,
                    "batch_size": batch_size,
                    "dtype": dtype,
                    "share": share,
                    "rounds": rounds,
                }
                records.append(out, {**setting, "budget": budget, **row, **records.provenance()})
                console.print(_line(name, share, row), highlight=False, soft_wrap=True)


def measured(
    planner: Planner,
    runs: StepRunner,
    plan: Plan,
    exact: list[torch.Tensor | None],
    rounds: int,
) -> records.Row:
    """Predictions and measurements of one plan."""
    policy = plan.policy
    saved_bytes = footprint(
        runs.model, runs.inputs, policy=policy, autocast=runs.autocast, loss=default_loss
    ).saved_bytes
    peak = planner.static + runs.peak(policy)
    error = relative_error(runs.gradients(policy), exact)
    plain, planned = runs.times([PLAIN, policy], rounds)
    ratios = [a / b for a, b in zip(planned, plain, strict=True)]
    return {
        "predicted": plan.prediction.to_dict(),
        "measured": {
            "saved_bytes": saved_bytes,
            "peak_bytes": peak,
            "time_ratio": statistics.median(ratios),
            "time_ratios": [round(ratio, 4) for ratio in ratios],
            "gradient_error": error,
        },
        "plain_peak_bytes": plan.plain.peak_bytes,
        "static_bytes": planner.static,
        "gap": plan.gap,
        "passes": planner.profile.sensitivity.passes,
        "choices": [list(line) for line in plan.summary()],
    }


def _line(name: str, share: float, row: records.Row) -> str:
    """One line that compares predictions and measurements."""
    predicted, actual = row["predicted"], row["measured"]
    return (
        f"{name} {share:.0%}: saved {format_bytes(predicted['saved_bytes'])} ({format_bytes(actual['saved_bytes'])}), "
        f"peak {format_bytes(predicted['peak_bytes'])} ({format_bytes(actual['peak_bytes'])}), "
        f"time {predicted['time_ratio']:.2f} ({actual['time_ratio']:.2f}), "
        f"error {predicted['gradient_error']:.2%} ({actual['gradient_error']:.2%})"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
