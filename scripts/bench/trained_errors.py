"""The gradient error of the presets on trained models: means over several batches.

A classifier gives one row of its head's input per image to the gradient. So the presets below 8 bits
have 8 bits for the last norm and the last linear layer. The offsets of a deformable convolution have
gradients that are differences of neighbouring values, so `mesa4` and `mesa3` have 6 bits for it. The
script also measures each preset without these overrides.

The models are those of `code_models.py`, in float32. A row for each model and policy goes to
docs/results/trained_errors.jsonl.

With `--patterns`, it measures which operands have the error of `mesa4` without these overrides: each
pattern alone has 8 bits.

    python scripts/bench/trained_errors.py --data cifar10:DIRECTORY
    python scripts/bench/trained_errors.py --data cifar10:DIRECTORY --models litv2 \\
        --patterns "last_linear;deformable_conv;last_linear,deformable_conv;*.dwconv:conv"
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from code_models import TRAINED, batches, subject
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy
from mesa_train.measure.step import relative_error
from mesa_train.training.data.packaged import load
from mesa_train.utils import records
from mesa_train.utils.patterns import ROLES

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/trained_errors.jsonl"
MEASURED = (
    "mesa8",
    "mesa6",
    "mesa4",
    "mesa3",
    "mesa8-recompute",
    "mesa6-recompute",
    "mesa4-recompute",
)
WITHOUT = "{}, without overrides of roles"


def main(
    data: Annotated[str, typer.Option(help="Photos to train on, such as cifar10:DIRECTORY.")],
    models: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(TRAINED)}.")] = (
        ",".join(TRAINED)
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Batches that are measured.")] = 5,
    patterns: Annotated[
        str, typer.Option(help="Patterns of a policy, separated by semicolons; commas join them.")
    ] = "",
    weights: Annotated[
        Path | None, typer.Option(help="A directory that keeps trained weights between runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure the presets on the chosen models."""
    names = models.split(",")
    for name in names:
        if name not in TRAINED:
            known = ", ".join(TRAINED)
            raise SystemExit(f"trained_errors: --models must be of {known}, got {name!r}")
    for name in names:
        try:
            images = load(data)
            of = subject(name, data, steps, weights, "")
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(f"trained_errors: --data: {error}") from None
        drawn = list(itertools.islice(batches(TRAINED[name], images, seed=2), draws))
        measured = policies() if not patterns else wider(patterns.split(";"))
        for row in rows(of.network, drawn, measured):
            print(of.name, row, flush=True)
            shared = {"model": of.name, "images": len(drawn[0][0]), "steps": steps}
            records.append(out, {**shared, **row, **records.provenance()})


def policies() -> Iterator[tuple[str, Policy]]:
    """The presets, and each without overrides of `ROLES`."""
    for name in MEASURED:
        policy = PRESETS[name]
        yield name, policy
        fields = {k: v for k, v in policy.overrides.items() if k not in ROLES}
        if fields != policy.overrides:
            yield WITHOUT.format(name), dataclasses.replace(policy, overrides=fields)


def wider(patterns: list[str]) -> Iterator[tuple[str, Policy]]:
    """`mesa4` without overrides of `ROLES`, and with 8 bits for each of the patterns."""
    preset = PRESETS["mesa4"]
    fields = {k: v for k, v in preset.overrides.items() if k not in ROLES}
    for chosen in ("", *patterns):
        more = {pattern: {"bits": 8} for pattern in chosen.split(",") if pattern}
        yield f"8 bits: {chosen}", dataclasses.replace(preset, overrides={**fields, **more})


def rows(
    network: nn.Module,
    drawn: list[tuple[Tensor, Tensor]],
    measured: Iterator[tuple[str, Policy]],
) -> Iterator[dict[str, Any]]:
    """A row for each policy: the saved bytes, and the errors on all batches."""
    exact = [gradients(network, x, y) for x, y in drawn]
    for name, policy in measured:
        saved = mesa_train.footprint(network, drawn[0][0], policy=policy, fake=True).saved_bytes
        mesa_train.wrap(network, policy)
        errors = [
            relative_error(gradients(network, x, y), plain)
            for (x, y), plain in zip(drawn, exact, strict=True)
        ]
        mesa_train.unwrap(network)
        yield {
            "policy": name,
            "saved_bytes": saved,
            "gradient_error": statistics.fmean(errors),
            "errors": errors,
        }


def gradients(network: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradients of one step."""
    loss = nn.functional.cross_entropy(network(x), y)
    return list(torch.autograd.grad(loss, list(network.parameters())))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
