"""Benchmark of rounding, group size and bits: the gradient error and bytes of the presets' choices.

One row for each variant goes to docs/results/rounding.jsonl. The script uses one batch and one
random initialisation. It therefore shows noise, not bias, and does not prove that a choice trains
as well; train_parity.py does.

    python scripts/bench/rounding.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/rounding.jsonl"

_ROUNDINGS = tuple({"rounding": how} for how in ("nearest", "stochastic", "dither"))

CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "mesa8": ({}, *_ROUNDINGS[1:], {"group_size": 64}),
    "mesa6": ({}, *_ROUNDINGS[:2], {"group_size": 64}),
    "mesa4": ({}, *_ROUNDINGS[:2], {"group_size": 64}),
    "mesa8-recompute": ({},),
    "mesa6-recompute": ({},),
    "mesa4-recompute": ({}, {"rounding": "stochastic"}, {"group_size": 64}),
}


def main(
    model: Annotated[str, typer.Option(help="A timm model.")] = "vit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    float32: Annotated[bool, typer.Option("--float32", help="No bf16 autocast.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every variant on one model and batch."""
    narrow = None if float32 else torch.bfloat16
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=10).train()
    config = network.default_cfg
    x = torch.randn(batch_size, *config["input_size"])
    y = torch.randint(0, 10, (batch_size,))
    exact = gradient(network, x, y, autocast=False)
    common = {
        "model": model,
        "batch_size": batch_size,
        "dtype": "float32" if float32 else "bf16",
        **records.provenance(),
    }

    def measure(preset: str, changes: dict[str, Any], policy: Policy | None) -> records.Row:
        counted = mesa_train.footprint(network, x, policy=policy or "plain", autocast=narrow)
        if policy is not None:
            mesa_train.wrap(network, policy)
        coded = gradient(network, x, y, autocast=not float32)
        mesa_train.unwrap(network)
        error = float((coded - exact).norm() / exact.norm())
        sizes = {"saved_bytes": counted.saved_bytes, "gradient_error": error}
        return {"preset": preset, "changes": changes, **sizes, **common}

    rows = [measure("plain", {}, None)]
    variants = [(preset, change) for preset, changes in CHANGES.items() for change in changes]
    for preset, changes in track(variants, description="rounding"):
        policy = dataclasses.replace(PRESETS[preset], **changes)
        rows.append(measure(preset, changes, policy))
    records.append(out, *rows)


def gradient(network: nn.Module, x: Tensor, y: Tensor, autocast: bool) -> Tensor:
    """The flattened gradient of the cross entropy over all parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = nn.functional.cross_entropy(network(x).float(), y)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([g.flatten() for g in gradients])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
