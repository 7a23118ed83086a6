"""Search for the bits of each operand: the smallest gradient error for the bytes of a preset.

The squared relative errors of the operands add up. So the script measures each operand alone with
each code, with all other stored tensors uncompressed. Then it predicts the error of every
allocation (`allocations.py`), and measures the presets and the best allocations of each budget. One
allocation is the best for all models together: the largest of its predicted errors is smallest.

A row for each measurement goes to docs/results/presets.jsonl: an operand alone with the bytes that
it saves against 8 bits (`kind` "operand"), or an allocation with its predicted error, the shares of
its operands in the predicted variance, and its measured error (`kind` "allocation").

Two models are measured in float32: a timm model at random initialisation on noise, and a small ViT
after some training steps on MNIST digits.

    python scripts/bench/presets.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from allocations import Code, Measured, best, codes_of, everyone, policy_of, stored_bytes, whole
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy
from mesa_train.measure.step import relative_error
from mesa_train.training import small_models
from mesa_train.training.data.packaged import load, train_batches
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/presets.jsonl"
BUDGETS = ("mesa4", "mesa6", "mesa3", "mesa4-recompute", "mesa6-recompute")


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, of random, trained.")
    ] = "random,trained",
    model: Annotated[
        str, typer.Option(help="The timm model of `random`.")
    ] = "vit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1, help="Of `random`.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of `trained`.")] = 200,
    top: Annotated[int, typer.Option(min=0, help="Allocations of a model and budget.")] = 2,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure the operands, the presets, and the best allocations for the bytes of the presets."""
    made = {"random": lambda: untrained(model, batch_size), "trained": lambda: trained(steps)}
    subjects = []
    for name in models.split(","):
        if name not in made:
            raise SystemExit(f"presets: --models must be of {', '.join(made)}, got {name!r}")
        subjects.append(Subject(*made[name]()))
    for subject, row in rows(subjects, top):
        print(subject.described, row, flush=True)
        named = {"model": subject.described, "images": len(subject.x)}
        records.append(out, {**named, **row, **records.provenance()})


def untrained(model: str, batch_size: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A timm model at random initialisation, noise and labels."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=10).train()
    x = torch.randn(batch_size, *network.default_cfg["input_size"])
    return network, x, torch.randint(0, 10, (batch_size,)), model


def trained(steps: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The small ViT after `steps` steps on MNIST digits, and another batch."""
    network, images = small_models.build("small_vit", load("mnist5k"), seed=0)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-3)
    batches = itertools.chain.from_iterable(
        train_batches(images, 64, seed=0, epoch=epoch) for epoch in itertools.count()
    )
    for x, y in itertools.islice(batches, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    x, y = next(batches)
    return network, x, y, f"small_vit after {steps} steps"


class Subject:
    """A model with a batch.

    Args:
        network: the model.
        x: images.
        y: their labels.
        described: the model's name in the rows.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, described: str) -> None:
        self.network, self.x, self.y, self.described = network, x, y, described
        self.exact = self.gradients(None)

    def gradients(self, policy: Policy | None) -> list[Tensor]:
        """The gradients of one step; None: of plain."""
        if policy is not None:
            mesa_train.wrap(self.network, policy)
        loss = nn.functional.cross_entropy(self.network(self.x), self.y)
        found = torch.autograd.grad(loss, list(self.network.parameters()))
        if policy is not None:
            mesa_train.unwrap(self.network)
        return list(found)

    def error(self, policy: Policy) -> float:
        """The relative distance of the gradients from plain's."""
        return relative_error(self.gradients(policy), self.exact)

    def saved(self, policy: Policy) -> int:
        """Bytes that a step saves for the backward."""
        return mesa_train.footprint(self.network, self.x, policy=policy, fake=True).saved_bytes


def rows(subjects: list[Subject], top: int) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The rows of all models, and the model of each."""
    measured: dict[str, list[Measured]] = {"cheap": [], "linear": []}
    for subject in subjects:
        for recompute, of_models in measured.items():
            found = Measured(stored_bytes(subject.saved, recompute), {})
            of_models.append(found)
            known = measured["cheap"][-1].errors
            for operand, code in found.bytes:
                # Only x_hat's error depends on what is recomputed from it.
                if recompute == "linear" and operand != "x_hat":
                    found.errors[operand, code] = known[operand, code]
                    continue
                error = subject.error(alone(recompute, operand, code, found))
                found.errors[operand, code] = error
                yield (
                    subject,
                    {
                        "kind": "operand",
                        "recompute": recompute,
                        "operand": operand,
                        "bits": code.bits,
                        "group_size": code.group_size,
                        "bytes_less": -found.bytes[operand, code],
                        "gradient_error": error,
                    },
                )
    for preset in BUDGETS:
        of_models = measured[PRESETS[preset].recompute]
        yield from allocations(preset, subjects, of_models, top)


def alone(recompute: str, operand: str, code: Code, found: Measured) -> Policy:
    """A policy with one operand's code, in which all other stored tensors are uncompressed."""
    if recompute == "cheap":
        return policy_of({operand: code}, "cheap", bits=32)
    # Matmuls are recomputed only if their outputs would have codes.
    others = {name: Code(32) for name, _ in found.bytes if name != operand}
    return policy_of({**others, operand: code}, recompute, bits=8)


def allocations(
    preset: str, subjects: list[Subject], measured: list[Measured], top: int
) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The rows of the allocations for one budget."""
    policy = PRESETS[preset]
    budgets = [subject.saved(policy) for subject in subjects]
    joint = best(measured, whole(subjects, policy.recompute), budgets, 1)
    for subject, found, budget in zip(subjects, measured, budgets, strict=True):
        base = whole([subject], policy.recompute)
        tried = [("the preset", codes_of(policy, everyone(measured)), policy)]
        named = [("this model", best([found], base, [budget], top))]
        named += [("all models", joint)] if len(subjects) > 1 else []
        for source, chosen in named:
            tried += [(source, codes, policy_of(codes, policy.recompute)) for codes in chosen]
        for source, codes, of_codes in tried:
            variances = found.variances(codes)
            total = sum(variances.values())
            yield (
                subject,
                {
                    "kind": "allocation",
                    "recompute": policy.recompute,
                    "budget": preset,
                    "budget_bytes": budget,
                    "best_for": source,
                    "codes": {name: str(code) for name, code in codes.items() if name in variances},
                    "saved_bytes": subject.saved(of_codes),
                    "predicted_error": total**0.5,
                    "variance_shares": {name: v / total for name, v in variances.items()},
                    "gradient_error": subject.error(of_codes),
                },
            )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
