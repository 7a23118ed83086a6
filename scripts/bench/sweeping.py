"""Shared code of the sweeps: one model in plain PyTorch and under presets, as one row.

A row records whether the outputs are equal bit for bit, the distance of the gradients from plain
PyTorch's, and the saved bytes of each policy. A failure of plain PyTorch gives a row too: such a
model cannot be compared. Runs are in float32 on a CPU, with random weights, in training mode, and
with the same seed in each run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.measure.footprint import Footprint, footprint
from mesa_train.measure.step import arguments, relative_error, tensors_in
from mesa_train.policy import PRESETS, Policy
from mesa_train.utils import records
from mesa_train.utils.records import Row

POLICIES = ("plain", "lossless", "mesa8", "mesa8-recompute")
# Policies whose bytes are counted.
COUNTED = ("plain", "lossless", "mesa8", "mesa8-recompute", "mesa4", "mesa4-recompute")
# The smallest compressed tensor: small models have small tensors.
MIN_BYTES = 1024
# A larger error than this is compared with that of a perturbation of the weights.
LARGE = 0.05
PERTURBATION = 1e-7
# dtypes of codes and masks.
CODES = ("uint8", "bool")
# Functions whose kernel saves a workspace of bytes, such as oneDNN's LSTM.
WORKSPACES = ("lstm",)
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
    args, kwargs = arguments(inputs)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["shapes"] = [list(t.shape) for t in tensors_in([*args, *kwargs.values()])]
    compare_runs(model, inputs, row, POLICIES)
    row["saved_bytes"] = {}
    for name in COUNTED:
        row["failed_in"] = name
        counted = _counted(model, inputs, name)
        row["saved_bytes"][name] = counted.saved_bytes
        if name == "mesa8":
            row["uncompressed"] = uncompressed(counted)
    del row["failed_in"]


def compare_runs(
    model: nn.Module, inputs: Any, row: Row, policies: Sequence[str], loss_alone: bool = False
) -> None:
    """Run a step under each policy, and fill in what differs from plain PyTorch.

    Args:
        model: in training mode; its buffers change.
        inputs: of the model.
        row: gets `outputs_equal`, and an error of the gradients for each preset, as `mesa8_error`. If one
            is large, `perturbed_error` is the change of plain PyTorch's gradients if each weight changes
            by a ten-millionth: a gradient that rounding errors decide.
        policies: "plain", and presets.
        loss_alone: as for `run_step`.
    """
    args, kwargs = arguments(inputs)
    state = copy.deepcopy(dict(model.named_buffers()))
    runs: dict[str, tuple[list[Tensor], list[Tensor | None]]] = {}
    for name in policies:
        row["failed_in"] = name
        _restore(model, state)
        if name != "plain":
            mesa_train.wrap(model, policy(name))
        try:
            runs[name] = run_step(model, args, kwargs, loss_alone)
        finally:
            mesa_train.unwrap(model)
    outputs, gradients = runs.pop("plain")
    row["outputs_equal"] = all(
        torch.equal(torch.nan_to_num(a, 7e7), torch.nan_to_num(b, 7e7))
        for found, _ in runs.values()
        for a, b in zip(found, outputs, strict=True)
    )
    for name, (_, found) in runs.items():
        row[f"{name}_error"] = relative_error(found, gradients)
    if max(row[f"{name}_error"] for name in runs) > LARGE:
        row["failed_in"] = "perturbed"
        _restore(model, state)
        row["perturbed_error"] = relative_error(_perturbed(model, args, kwargs), gradients)


def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the buffers of a model their values in `state`."""
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            # A buffer that a forward replaces may have another shape.
            if key in state and state[key].shape == buffer.shape:
                buffer.copy_(state[key])


def _perturbed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor | None]:
    """The gradients of plain PyTorch with slightly different weights. The weights stay as they are."""
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + PERTURBATION * torch.randn_like(parameter))
    try:
        return run_step(model, args, kwargs)[1]
    finally:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)


def policy(name: str) -> Policy:
    """A preset for tensors of small models."""
    return dataclasses.replace(PRESETS[name], min_bytes=MIN_BYTES)


def uncompressed(counted: Footprint, most: int = 4) -> dict[str, int]:
    """Bytes of tensors that are neither codes nor masks, by operator, largest first."""
    totals: dict[str, int] = {}
    for saved in counted.rows:
        if saved.dtype not in CODES or saved.operator in WORKSPACES:
            totals[saved.operator] = totals.get(saved.operator, 0) + saved.saved_bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1])[:most])


def _counted(model: nn.Module, inputs: Any, name: str) -> Footprint:
    """The footprint of a policy; on real tensors if the forward reads values."""
    for fake in (True, False):
        torch.manual_seed(1)
        try:
            return footprint(
                model, inputs, policy="plain" if name == "plain" else policy(name), fake=fake
            )
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
