"""Search for the bits of each operand: the smallest gradient error for the bytes of a preset.

The squared relative errors of the operands add up. So the script measures each operand alone at
each width, with all other tensors uncompressed. Then it predicts the error of every allocation, and
measures the best allocations of each budget. A row for each measurement goes to
docs/results/presets.jsonl: an operand alone with the bytes that it saves against 8 bits (`kind`
"operand"), or an allocation with its predicted and its measured error (`kind` "allocation").

Two models are measured in float32: a timm model at random initialisation on noise, and a small ViT
after some training steps on MNIST digits.

    python scripts/bench/presets.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy
from mesa_train.measure.step import relative_error
from mesa_train.training import small_models
from mesa_train.training.data.packaged import load, train_batches
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/presets.jsonl"
WIDTHS = (8, 6, 5, 4, 3, 2)
# Operands that get their bits together, by name.
OPERANDS = {
    "x_hat": ("layer_norm",),
    "activation": ("activation",),
    "q, k": ("attention.q", "attention.k"),
    "v": ("attention.v",),
    "out": ("attention.out", "linear"),
    "conv": ("conv",),
}
# The allocations that are measured for each budget.
BEST = 3

Gradients = Callable[[Policy | None], list[Tensor]]


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, of random, trained.")
    ] = "random,trained",
    model: Annotated[
        str, typer.Option(help="The timm model of `random`.")
    ] = "vit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1, help="Of `random`.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of `trained`.")] = 200,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure the operands, and the best allocations for the bytes of mesa4 and of mesa6."""
    made = {"random": lambda: untrained(model, batch_size), "trained": lambda: trained(steps)}
    for name in models.split(","):
        if name not in made:
            raise SystemExit(f"presets: --models must be of {', '.join(made)}, got {name!r}")
        network, x, y, described = made[name]()
        gradients = step(network, x, y)
        for row in rows(network, x, gradients):
            print({k: v for k, v in row.items() if k != "policy"}, flush=True)
            records.append(
                out, {"model": described, "images": len(x), **row, **records.provenance()}
            )


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


def step(network: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """A function that runs one step with a policy (None: plain) and returns the gradients."""

    def gradients(policy: Policy | None) -> list[Tensor]:
        if policy is not None:
            mesa_train.wrap(network, policy)
        loss = nn.functional.cross_entropy(network(x), y)
        found = torch.autograd.grad(loss, list(network.parameters()))
        if policy is not None:
            mesa_train.unwrap(network)
        return list(found)

    return gradients


def rows(network: nn.Module, x: Tensor, gradients: Gradients) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    exact = gradients(None)
    # Bytes add up among codes, but not between codes and uncompressed tensors, which operators share.
    whole = saved(network, x, Policy(bits=8))
    error: dict[tuple[str, int], float] = {}
    size: dict[tuple[str, int], int] = {}
    for name, width in itertools.product(OPERANDS, WIDTHS):
        overrides = {operand: {"bits": width} for operand in OPERANDS[name]}
        alone = Policy(bits=32, overrides=overrides)
        error[name, width] = relative_error(gradients(alone), exact)
        size[name, width] = saved(network, x, Policy(bits=8, overrides=overrides)) - whole
        yield {
            "kind": "operand",
            "operand": name,
            "bits": width,
            "bytes_less": -size[name, width],
            "gradient_error": error[name, width],
        }
    for preset in ("mesa4", "mesa6"):
        budget = saved(network, x, PRESETS[preset])
        found = []
        for widths in itertools.product(WIDTHS, repeat=len(OPERANDS)):
            bits = dict(zip(OPERANDS, widths, strict=True))
            if whole + sum(size[item] for item in bits.items()) <= budget:
                found.append((sum(error[item] ** 2 for item in bits.items()) ** 0.5, bits))
        best = sorted(found, key=lambda entry: entry[0])[:BEST]
        tried = [(predicted, bits, allocation(bits)) for predicted, bits in best]
        for predicted, allocated, policy in [(None, None, PRESETS[preset]), *tried]:
            yield {
                "kind": "allocation",
                "budget": preset,
                "budget_bytes": budget,
                "bits": allocated,
                "saved_bytes": saved(network, x, policy),
                "predicted_error": predicted,
                "gradient_error": relative_error(gradients(policy), exact),
            }


def saved(network: nn.Module, x: Tensor, policy: Policy) -> int:
    """Bytes that a step saves for the backward."""
    return mesa_train.footprint(network, x, policy=policy, fake=True).saved_bytes


def allocation(chosen: dict[str, int]) -> Policy:
    """The policy of an allocation. Operands that `OPERANDS` does not name have 8 bits."""
    overrides = {o: {"bits": bits} for name, bits in chosen.items() for o in OPERANDS[name]}
    return Policy(bits=8, overrides=overrides)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
