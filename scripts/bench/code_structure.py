"""Gradient errors of other codes than affine groups of 128, and the energy of the means.

`structured_codes.py` replaces the operators of `Affine`, so no code needs a kernel. Every variant
has an exact count of bits per element. The variants are finer groups, 8-bit scales, removed means,
scales per channel, a Hadamard rotation, and Lloyd-Max levels. An operand is measured alone, or the
preset as a whole. An error is the mean over draws. A row for each model, operand and variant goes
to docs/results/code_structure.jsonl. A row for each model and operand with the mean's share of the
energy in every layer goes to docs/results/mean_share.jsonl.

`code_models.py` has the models: a timm ViT at random initialisation; ViTs that the script trains on
photos (--data); and a trained sentence transformer, if a directory has one (--sentences).

    python scripts/bench/code_structure.py --data cifar10:DIRECTORY --sentences DIRECTORY
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from code_models import NAMES, Subject, subject
from structured_codes import AFFINE, ALL, PAIR, VARIANTS, rounded_codec
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mesa_train
from mesa_train import PRESETS, Policy, codecs
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.measure.step import relative_error
from mesa_train.utils import records
from mesa_train.utils.patterns import ROLES

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"

# Operands of mesa4 that are measured alone: by name, the policy's pattern, the role of the tensor.
OPERANDS = {
    "x_hat": ("layer_norm", "x_hat"),
    "GELU's input": ("activation", "activation"),
    "q": ("attention.q", "linear"),
    "v": ("attention.v", "linear"),
    "attention's output": ("attention.out", "linear"),
}
# The whole preset: the roles that a variant is for. The last norm has the bits of the other norms, as in `mesa4` before
# 2026-11-30. The preset since then is `OF_LAST_NORM`.
OF_LAST_NORM = "mesa4, 8 bits for the last norm"
WHOLE = {"mesa4": ALL, "mesa4, x_hat and GELU's input": PAIR, OF_LAST_NORM: ALL}


def main(
    data: Annotated[str, typer.Option(help="Photos to train on, such as cifar10:DIRECTORY.")] = "",
    sentences: Annotated[
        str, typer.Option(help="A directory with a trained sentence transformer.")
    ] = "",
    models: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(NAMES)}.")] = (
        ",".join(NAMES)
    ),
    operands: Annotated[
        str, typer.Option(help=f"Separated by semicolons, of {'; '.join([*OPERANDS, *WHOLE])}.")
    ] = ";".join([*OPERANDS, *WHOLE]),
    variants: Annotated[
        str, typer.Option(help="Codes of structured_codes.VARIANTS, separated by semicolons.")
    ] = ";".join(VARIANTS),
    steps: Annotated[int, typer.Option(min=0, help="Training steps on photos.")] = 500,
    draws: Annotated[int, typer.Option(min=1)] = 3,
    weights: Annotated[
        Path | None, typer.Option(help="A directory that keeps trained weights between runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder; rows are appended.")] = RESULTS,
) -> None:
    """Measure the codes and the means' shares on the chosen models."""
    wanted = chosen("operands", operands, [*OPERANDS, *WHOLE])
    codes = chosen("variants", variants, VARIANTS)
    for name in models.split(","):
        try:
            of = subject(name, data, steps, weights, sentences)
        except ValueError as error:
            raise SystemExit(f"code_structure: --models: {error}") from None
        shared = {"model": of.name, "images": of.images}
        for row in mean_shares(of):
            print(row, flush=True)
            records.append(out / "mean_share.jsonl", {**shared, **row, **records.provenance()})
        for row in measure(of, draws, wanted, codes):
            print(of.name, row, flush=True)
            named = {**shared, "draws": draws, **row, **records.provenance()}
            records.append(out / "code_structure.jsonl", named)


def chosen(option: str, text: str, choices: Iterable[str]) -> list[str]:
    """The names in `text`. SystemExit if one is not among the choices."""
    names = text.split(";")
    for name in names:
        if name not in choices:
            listed = "; ".join(choices)
            raise SystemExit(f"code_structure: --{option} has {name!r}; choose from {listed}")
    return names


# --- measurements ---


def measure(
    subject: Subject, draws: int, operands: Sequence[str], variants: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    exact = gradients(subject, None)
    for operand, named in itertools.product(operands, variants):
        policy, role = policy_of(operand)
        variant = VARIANTS[named]
        if variant.levels == "normal" and role != "x_hat":
            continue  # these levels are for a variance of 1
        if role == PAIR and not variant.mean and named != AFFINE:
            continue
        used: tuple[list[float], ...] = ([], [])
        of = functools.partial(rounded_codec, variant, role, subject.images, used)
        errors = []
        # Rounding to nearest has one outcome.
        nearest = operand in OPERANDS and (role == "activation" or variant.levels != "affine")
        for draw in range(1 if nearest else draws):
            torch.manual_seed(draw)
            # The native rows call the kernels themselves.
            with native.python_rows(CompressionMode), mock.patch.object(codecs, "of", of):
                errors.append(relative_error(gradients(subject, policy), exact))
        yield {
            "operand": operand,
            "variant": named,
            "bits": sum(used[0]) / max(1, sum(used[1])),
            "gradient_error": statistics.fmean(errors),
            "errors": errors,
        }


def policy_of(operand: str) -> tuple[Policy, str]:
    """A whole preset of `WHOLE`, or a policy with this operand alone at its bits; and the role of a variant."""
    preset = PRESETS["mesa4"]
    if operand == OF_LAST_NORM:
        return preset, ALL
    if operand in WHOLE:
        fields = {k: v for k, v in preset.overrides.items() if k not in ROLES}
        return dataclasses.replace(preset, overrides=fields), WHOLE[operand]
    pattern, role = OPERANDS[operand]
    return Policy(bits=32, overrides={pattern: width(preset, pattern)}), role


def width(preset: Policy, pattern: str) -> dict[str, int]:
    """The bits of an operand in a preset."""
    operator = pattern.split(".")[0]
    fields = {**preset.overrides.get(operator, {}), **preset.overrides.get(pattern, {})}
    return {"bits": fields.get("bits", preset.bits)}


def gradients(subject: Subject, policy: Policy | None) -> list[Tensor]:
    """The gradients of one step; zeros for an unused weight."""
    network = subject.network
    if policy is not None:
        mesa_train.wrap(network, policy)
    weights = list(network.parameters())
    found = torch.autograd.grad(subject.loss(), weights, allow_unused=True)
    if policy is not None:
        mesa_train.unwrap(network)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


# --- the mean's share ---


class Means(TorchFunctionMode):
    """Collects the mean's share of the energy of every x_hat and every input of GELU.

    A tensor (images, ..., channels) has the share sum(mean^2) / mean(sum(x^2)), for the mean of each
    channel over an image, and over the batch. GELUs before the first layer norm are left out: they
    are in a convolutional stem, whose channels are not the last dimension.

    Attributes:
        shares: (operand, share of the images' means, share of the batch's mean), in the order of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[tuple[str, float, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            self._collect("x_hat", F.layer_norm(args[0], args[0].shape[-1:]))
        elif func is F.gelu and self.shares:
            self._collect("GELU's input", args[0])
        return func(*args, **(kwargs or {}))

    def _collect(self, operand: str, x: Tensor) -> None:
        if x.dim() > 2:
            rows = x.detach().reshape(len(x), -1, x.shape[-1])
            energy = rows.square().mean((0, 1)).sum()
            of_images = rows.mean(1).square().mean(0).sum() / energy
            of_batch = rows.mean((0, 1)).square().sum() / energy
            self.shares.append((operand, of_images.item(), of_batch.item()))


def mean_shares(subject: Subject) -> Iterator[dict[str, Any]]:
    """A row for x_hat and one for GELU's input: the shares of all layers, in order."""
    with torch.no_grad(), Means() as means:
        subject.loss()
    for operand in dict.fromkeys(operand for operand, *_ in means.shares):
        yield {
            "operand": operand,
            "of_images": [images for name, images, _ in means.shares if name == operand],
            "of_batch": [batch for name, _, batch in means.shares if name == operand],
        }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
