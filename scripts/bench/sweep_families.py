"""Sweep of model families: exact outputs, gradient error and saved bytes, one row a model.

The models are those of `family_models`: the real architecture of the library, small, with random
weights. Runs are in float32 on a CPU, in training mode, and draw the same random numbers. A row has
the saved bytes of plain PyTorch, of presets and of checkpointing, with all weights trained and with
adapters. It names the largest tensors that mesa8 leaves uncompressed. With --steps it also has the
median time of a forward and backward in plain PyTorch and under mesa8. Rows go to
docs/results/sweep_families.jsonl. A second run continues after the last row.

The presets run with min_bytes=1024 instead of 16384: the tensors of the small configurations are
smaller than those of a real training.

    python scripts/bench/sweep_families.py
    python scripts/bench/sweep_families.py --models "DINOv2,Flux" --again
    python scripts/bench/sweep_families.py --steps 7 --again
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from family_models import Case, load
from sweeping import compare_runs, policy, run_step, step, step_times, sweep, uncompressed
from torch import nn

import mesa_train
from mesa_train.measure.footprint import Footprint, footprint
from mesa_train.measure.step import arguments, relative_error, tensors_in
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.policy import PRESETS
from mesa_train.utils.records import Row

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/sweep_families.jsonl"
# Policies that run a step.
RUNS = ("plain", "lossless", "mesa8")
COUNTED = ("lossless", "mesa8", "mesa4", "mesa8-recompute", "mesa4-recompute")


def main(
    models: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    seconds: Annotated[int, typer.Option(min=1, help="Limit per model.")] = 120,
    again: Annotated[bool, typer.Option("--again", help="Repeat models with a row.")] = False,
    steps: Annotated[
        int, typer.Option(min=0, help="Timed steps of each method; 0 times none.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # the libraries' own
    logging.disable(logging.WARNING)
    cases, missing = load()
    for line in missing:
        typer.echo(f"sweep_families: left out: {line}", err=True)
    selected = [m.strip() for m in models.split(",") if m.strip()] or list(cases)
    unknown = [name for name in selected if name not in cases]
    if unknown:
        raise SystemExit(f"sweep_families: no model {', '.join(unknown)}")
    measures = [(name, functools.partial(measure, cases[name], steps=steps)) for name in selected]
    sweep(measures, out, seconds, again)


def measure(case: Case, row: Row, steps: int = 0) -> None:
    """Fill in a row, step by step. `failed_in` is the current step.

    Args:
        case: the model.
        row: the row.
        steps: timed steps of plain PyTorch and of mesa8; 0 (default) times none.
    """
    row["failed_in"], row["group"] = "making", case.group
    torch.manual_seed(0)
    model, inputs = case.make()
    model.train()
    args, kwargs = arguments(inputs)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["shapes"] = [list(t.shape) for t in tensors_in([*args, *kwargs.values()])]
    compare_runs(model, inputs, row, RUNS, loss_alone=True)
    row["saved_bytes"] = {}
    for name in ("plain", *COUNTED, "checkpoint"):
        row["failed_in"] = name
        counted = count(model, inputs, name)
        if counted is None:
            continue
        row["saved_bytes"][name] = counted.saved_bytes
        if name == "mesa8":
            row["uncompressed"] = uncompressed(counted)
    if steps:
        row["failed_in"] = "steps"
        row["step_ms"], row["steps"] = timed(case, steps), steps
    if case.lora is not None:
        row["failed_in"] = "lora"
        row["lora"] = adapted(model, inputs, case.lora)
    del row["failed_in"]


def timed(case: Case, rounds: int) -> dict[str, float]:
    """Median time in ms of a forward and backward, plain and under mesa8, in turns."""
    runs = {}
    for name in ("plain", "mesa8"):
        torch.manual_seed(0)
        model, inputs = case.make()
        model.train()
        args, kwargs = arguments(inputs)
        if name != "plain":
            mesa_train.wrap(model, policy(name))
        runs[name] = functools.partial(step, model, args, kwargs, loss_alone=True)
    return step_times(runs, rounds)


def adapted(model: nn.Module, inputs: Any, targets: Any) -> Row:
    """Saved bytes and gradient error of LoRA, with the methods that beginners combine it with."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=8, target_modules=list(targets), init_lora_weights=False)
    model.requires_grad_(False)
    inject_adapter_in_model(settings, model)
    args, kwargs = arguments(inputs)
    saved = {}
    for name in ("plain", "mesa8", "mesa4", "mesa8-recompute", "checkpoint"):
        counted = count(model, inputs, name)
        if counted is not None:
            saved[name] = counted.saved_bytes
    _, plain = run_step(model, args, kwargs, loss_alone=True)
    mesa_train.wrap(model, policy("mesa8"))
    _, coded = run_step(model, args, kwargs, loss_alone=True)
    mesa_train.unwrap(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "saved_bytes": saved, "mesa8_error": relative_error(coded, plain)}


def count(model: nn.Module, inputs: Any, name: str) -> Footprint | None:
    """The footprint of a method; None if the model has no blocks that PyTorch can checkpoint."""
    torch.manual_seed(1)
    try:
        return footprint(model, inputs, policy=policy(name) if name in PRESETS else name)
    except NoBlocks:
        return None
    except RuntimeError as error:
        # PyTorch's checkpoint reads the sizes of a jagged tensor's parts, which have none.
        if name != "checkpoint" or "NestedTensorImpl doesn't support sizes" not in str(error):
            raise
        return None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
