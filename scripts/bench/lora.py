"""Where fine-tuning runs out of memory, with all weights trained, with LoRA and with DoRA.

Counted on fake tensors: a whole step with gradients and AdamW's states, under bf16 autocast. The peak
of a step is a line in the batch size, so two batches give the largest batch of a budget. One row for
each method goes to docs/results/lora.jsonl.

    python scripts/bench/lora.py
    python scripts/bench/lora.py --model vit_base_patch14_dinov2 --budget 12GiB
    python scripts/bench/lora.py --tuned DoRA --methods mesa8-recompute
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from mesa_train.loading.model import load
from mesa_train.measure.footprint import footprint
from mesa_train.measure.optimizer_states import static_bytes
from mesa_train.measure.timeline import timeline
from mesa_train.utils import records
from mesa_train.utils.formatting import parse_bytes

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/lora.jsonl"
# Methods with all weights trained, and with adapters.
FULL = ("plain", "mesa8-recompute")
ADAPTED = ("plain", "checkpoint", "mesa8", "mesa8-recompute", "mesa4-recompute")
TUNED = {"all weights": FULL, "LoRA": ADAPTED, "DoRA": ADAPTED}
# Large, because the gradients of all weights are the peak of a step with a small batch.
BATCHES = (256, 512)


def main(
    model: Annotated[str, typer.Option(help="As for mesa-train compare.")] = (
        "vit_large_patch14_dinov2"
    ),
    image_size: Annotated[int, typer.Option(help="Height and width.")] = 224,
    budget: Annotated[str, typer.Option(help="Memory of the GPU.")] = "24GiB",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 8,
    tuned: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = ", ".join(TUNED),
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Count every method."""
    origin = records.provenance()
    capacity = parse_bytes(budget)
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    for kind in (name.strip() for name in tuned.split(",")):
        if kind not in TUNED:
            raise SystemExit(f"lora: --tuned {kind!r}: choose from {', '.join(TUNED)}")
        for method in (m for m in TUNED[kind] if m in chosen or not chosen):
            peaks, saved = [], []
            for batch in BATCHES:
                loaded = load(model, batch_size=batch, image_size=image_size, device="meta")
                if kind != "all weights":
                    adapt(loaded.model, rank, dora=kind == "DoRA")
                loaded.model.train()
                counted = timeline(
                    loaded.model, loaded.inputs, policy=method, autocast=torch.bfloat16
                )
                static = static_bytes(loaded.model, loaded.inputs, None)
                peaks.append(static + counted.peak_bytes)
                footprint_of = footprint(
                    loaded.model, loaded.inputs, policy=method, autocast=torch.bfloat16
                )
                saved.append(footprint_of.saved_bytes)
            more = BATCHES[1] - BATCHES[0]
            slope = (peaks[1] - peaks[0]) / more
            largest = int((capacity - peaks[0]) // slope) + BATCHES[0]
            trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
            row = {"model": model, "image_size": image_size, "tuned": kind, "method": method}
            row |= {"rank": rank, "trained": trained, "budget": budget, "static_bytes": static}
            row |= {"saved_bytes_an_image": (saved[1] - saved[0]) // more}
            row |= {"peak_bytes_an_image": int(slope), "largest_batch": largest}
            records.append(out, {**row, "dtype": "bf16 autocast, counted", **origin})
            typer.echo(f"{kind} {method}: {largest}")


def adapt(model: nn.Module, rank: int, dora: bool = False) -> None:
    """Freeze the weights, and add adapters to every Linear of the blocks.

    Args:
        model: the model; changed in place.
        rank: of the adapters.
        dora: also train the magnitude of each output feature. Default False.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    targets = ["qkv", "proj", "fc1", "fc2"]
    settings = LoraConfig(r=rank, target_modules=targets, use_dora=dora)
    inject_adapter_in_model(settings, model)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
