"""Shared code of the sweeps: one model in plain PyTorch and under presets, as one row.

A row records whether the outputs are equal bit for bit, the distance of the gradients from plain
PyTorch's, and the saved bytes of each policy. A failure of plain PyTorch gives a row too: such a
model cannot be compared. Runs are in float32 on a CPU, with random weights, in training mode, and
with the same seed in each run.
"""

from __future__ import annotations

import copy
import functools
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.measure.step import arguments, relative_error, tensors_in
from mesa_train.utils import records
from mesa_train.utils.records import Row

POLICIES = ("plain", "lossless", "mesa8", "mesa8-recompute")
# Policies whose bytes only are counted.
COUNTED = ("mesa4", "mesa4-recompute")
# Builds a model and its inputs: a tensor, or a mapping of keyword arguments.
Make = Callable[[], tuple[nn.Module, Any]]


class TooLongError(Exception):
    """A model took longer than the sweep allows."""


# Fills in a row step by step; `row["failed_in"]` is the current step.
Measure = Callable[[Row], None]


def sweep_makers(makers: Iterable[tuple[str, Make]], out: Path, seconds: int, again: bool) -> None:
    """`sweep` of models with `row_of`."""
    sweep([(n, functools.partial(row_of, make)) for n, make in makers], out, seconds, again)


def sweep(measures: Iterable[tuple[str, Measure]], out: Path, seconds: int, again: bool) -> None:
    """Append a row for each model to `out`. Models with a row are skipped unless `again`.

    Args:
        measures: (name, function that fills in the model's row).
        out: JSON lines.
        seconds: limit for a model; a model that exceeds it gets a row with that failure.
        again: repeat models that have a row.
    """
    done = set() if again else {row["model"] for row in records.read(out)}
    for name, measure in measures:
        if name in done:
            continue
        row = {"model": name, **limited(measure, seconds)}
        records.append(out, {**row, **records.provenance()})
        saved = row.get("saved_bytes", {})
        print(f"{name}: {row['failure'] or row['mesa8_error']} {saved}", flush=True)
        gc.collect()


def limited(measure: Measure, seconds: int) -> Row:
    """A measured row, with a time limit. Every error becomes the row's failure."""

    def stop(*_: object) -> None:
        raise TooLongError(f"longer than {seconds} s")

    old_handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    row: Row = {"failure": ""}
    try:
        measure(row)
    except Exception as error:  # a foreign model may raise any error
        row["failure"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
    return row


def row_of(make: Make, row: Row) -> None:
    """Fill in `row` step by step, to show the progress. `failed_in` is the current step."""
    row["failed_in"] = "making"
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    state = copy.deepcopy(dict(model.named_buffers()))
    args, kwargs = arguments(inputs)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["shapes"] = [list(t.shape) for t in tensors_in([*args, *kwargs.values()])]
    runs: dict[str, tuple[list[Tensor], list[Tensor | None]]] = {}
    row["saved_bytes"] = {}
    for policy in POLICIES:
        row["failed_in"] = policy
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                # A buffer that a forward replaces may have another shape.
                if name in state and state[name].shape == buffer.shape:
                    buffer.copy_(state[name])
        if policy != "plain":
            mesa_train.wrap(model, policy)
        try:
            runs[policy] = run_step(model, args, kwargs)
        finally:
            mesa_train.unwrap(model)
        row["saved_bytes"][policy] = _saved_bytes(model, inputs, policy)
    for policy in COUNTED:
        row["failed_in"] = policy
        row["saved_bytes"][policy] = _saved_bytes(model, inputs, policy)
    outputs, gradients = runs["plain"]
    row["outputs_equal"] = all(
        torch.equal(torch.nan_to_num(a, 7e7), torch.nan_to_num(b, 7e7))
        for policy in POLICIES
        for a, b in zip(runs[policy][0], outputs, strict=True)
    )
    for policy in POLICIES[1:]:
        row[f"{policy}_error"] = relative_error(runs[policy][1], gradients)
    del row["failed_in"]


def _saved_bytes(model: nn.Module, inputs: Any, policy: str) -> int:
    """Bytes that a policy saves; on real tensors if the forward reads values."""
    for fake in (True, False):
        torch.manual_seed(1)
        try:
            return mesa_train.footprint(model, inputs, policy=policy, fake=fake).saved_bytes
        except ValueError:
            if not fake:
                raise
    raise AssertionError


def run_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss_alone: bool = False
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the parameters' gradients of a fixed weighting of all outputs.

    With `loss_alone`, a model that returns a loss gets the gradients of its loss.
    """
    output = step(model, args, kwargs, loss_alone)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [t.detach() for t in tensors_in(output)], gradients


def step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss_alone: bool = False
) -> Any:
    """Run a forward and a backward as `run_step` does. Return the output."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    output = model(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if loss_alone and loss is not None:
        loss.backward()
        return output
    tracked = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not tracked:
        raise ValueError("no output needs a gradient")
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator) / t.numel() ** 0.5 for t in tracked]
    torch.autograd.backward([t.float() for t in tracked], weights)
    return output


def step_times(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each step in ms.

    The steps take turns, and every second round has the reverse order. So a drift of the machine
    changes all medians alike. One round before the measured rounds is not counted.

    Args:
        steps: a function that runs a step, by name.
        rounds: measured runs of each step.
    Returns:
        The medians by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name in steps if round_ % 2 else reversed(list(steps)):
            start = time.perf_counter()
            steps[name]()
            if round_:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}
