"""What a model of this family needs on 1x24, 1x80, 8x24, 8x40 and 8x80 GB, counted on the meta device.

python recipes/vit22b/estimate.py vit_22b
"""

from __future__ import annotations

from typing import Annotated

import typer

from mesa_train.memory.text import format_bytes
from mesa_train.policy import PRESETS
from mesa_train.training.estimates import Sizes, table


def main(
    name: Annotated[str, typer.Argument(help="A model of mesa_train.models.vit22b.")] = "vit_22b",
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 224,
) -> None:
    """Print kept bytes of an image for every preset, and a table of machines and schemes."""
    sizes = Sizes(name, image_size)
    print(f"{name} at {image_size} px: {sizes.parameters:,} parameters\n")
    print("| policy | kept for one image |\n| --- | ---: |")
    for policy in ("plain", "checkpoint", *PRESETS, "coded"):
        print(f"| {policy} | {format_bytes(sizes.kept(policy))} |")
    print("\n" + table(sizes))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
