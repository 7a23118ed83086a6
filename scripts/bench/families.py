"""What each family of models keeps for the backward, plain against presets, and the gradient error
that costs.

One row per model and method goes to docs/results/families.jsonl. Random weights, drop path off,
bf16 autocast.

    python scripts/bench/families.py
    python scripts/bench/families.py --models vit_tiny_patch16_224,hf:dinov2 --batch-size 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from mesa_train.loading.model import load
from mesa_train.measure.runner import compare
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/families.jsonl"

MODELS = (
    "vit_tiny_patch16_224,deit3_small_patch16_224,beit_base_patch16_224,eva02_tiny_patch14_224,"
    "swin_tiny_patch4_window7_224,swinv2_tiny_window8_256,pvt_v2_b0,twins_svt_small,cait_xxs24_224,"
    "xcit_nano_12_p16_224,mvitv2_tiny,maxvit_rmlp_pico_rw_256,volo_d1_224,hiera_tiny_224,"
    "tiny_vit_5m_224,convnext_atto,resnet50,hf:vit,hf:swin,hf:beit,hf:deit,"
    "torchvision:vit_b_16,torchvision:swin_t,torchvision:maxvit_t"
)


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, as for mesa-train compare.")
    ] = MODELS,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "plain,mesa8,mesa4",
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every model with every method."""
    for name in track([m.strip() for m in models.split(",")], description="families"):
        torch.manual_seed(0)
        try:
            loaded = load(name, batch_size=batch_size)
            for module in loaded.model.modules():
                for attribute in ("drop_prob", "p"):
                    if isinstance(getattr(module, attribute, None), float):
                        setattr(module, attribute, 0.0)
            measured = compare(
                loaded.model.train(),
                loaded.inputs,
                methods.split(","),
                autocast=torch.bfloat16,
                time=False,
            )
        except ValueError as error:
            raise SystemExit(f"bench_families: {name}: {error}") from None
        common = {"model": name, "batch_size": batch_size, "dtype": "bf16 autocast"}
        origin = records.provenance()
        records.append(out, *[{**common, **row.to_dict(), **origin} for row in measured])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
