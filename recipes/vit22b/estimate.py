"""Memory estimate of a ViT-22B model on 1x24, 1x80, 8x24, 8x40 and 8x80 GB, on the meta device.

python recipes/vit22b/estimate.py vit_22b
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mesa_train.training.vit22b import estimates
from mesa_train.training.vit22b.estimates import CODED, SCHEMES
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes, format_table

ONE_CARD = ("nf4", "lion", "factored")


def main(
    name: Annotated[str, typer.Argument(help="A model of mesa_train.models.vit22b.")] = "vit_22b",
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 224,
    out: Annotated[Path | None, typer.Option(help="JSON lines to append a row to.")] = None,
) -> None:
    """Print an image's saved bytes for every preset, and the batches that fit on five machines."""
    try:
        counted = estimates.estimator(name, image_size)
        parameters = counted.parameters(SCHEMES["fsdp2"][1]).total
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    kept = estimates.saved_by_method(name, image_size)
    found = estimates.fits(counted)
    cards = {
        key: estimates.components(estimates.one_card(name, key, image_size, 8, CODED))
        for key in ONE_CARD
    }
    console = Console()

    def show(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    show(f"{name} at {image_size} px: {parameters:,} parameters\n")
    lines = [[policy, format_bytes(size)] for policy, size in kept.items()]
    show(format_table(["policy", "kept for one image"], lines))
    policies = list(found[0]["images"]) if found else []
    lines = [
        [
            f"{row['machine']} GB",
            row["scheme"],
            format_bytes(row["states_bytes"]),
            format_bytes(row["host_bytes"]) if row["host_bytes"] else "",
            *[str(row["images"].get(policy, "")) for policy in policies],
        ]
        for row in found
    ]
    head = ["machine", "scheme", "states / card", "host", *[f"{p}: images" for p in policies]]
    show("\n" + format_table(head, lines))
    if out is not None:
        row = {
            "model": name,
            "image_size": image_size,
            "parameters": parameters,
            "saved_bytes": kept,
            "fits": found,
            "one_card": {key: {"scheme": SCHEMES[key][0], **parts} for key, parts in cards.items()},
        }
        records.append(out, {**row, **records.provenance("cpu")})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
