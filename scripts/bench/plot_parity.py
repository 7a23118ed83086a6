"""Plot of the rows that train_parity.py wrote: docs/results/train_parity.png.

    python scripts/bench/plot_parity.py [ROWS.jsonl] [PICTURE.png]
    python scripts/bench/plot_parity.py --model small_vit --data cifar10

Only rows with the settings of the newest row of the model and data are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mesa_train.report import figures as plots
from mesa_train.report.columns import in_order
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


def main(
    rows: Annotated[Path, typer.Argument()] = RESULTS / "train_parity.jsonl",
    picture: Annotated[Path, typer.Argument()] = RESULTS / "train_parity.png",
    model: Annotated[str | None, typer.Option(help="Default: that of the newest row.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: that of the newest row.")] = None,
) -> None:
    """Draw loss, held-out accuracy, and every seed's final accuracy, for each policy."""
    wanted = {"model": model, "data": data}
    recorded = [
        row
        for row in records.read(rows)
        if all(value in (None, row["settings"][key]) for key, value in wanted.items())
    ]
    if not recorded:
        of = "".join(f" of {key} {value}" for key, value in wanted.items() if value is not None)
        raise SystemExit(
            f"plot_parity: no rows{of} in {rows}; run scripts/bench/train_parity.py first"
        )
    settings = recorded[-1]["settings"]
    recorded = in_order(row for row in recorded if row["settings"] == settings)
    final = [row for row in recorded if row["epoch"] == settings["epochs"]]
    seeds = len(records.group_by(final, "seed"))
    figure, (loss, accuracy, last) = plots.figure(
        3,
        f"{settings['model']} from scratch on {settings['train_images']:,} images of "
        f"{settings['data']}"
        + (f": mean of {seeds} seeds (bold) and each seed (thin)" if seeds > 1 else ""),
    )
    plots.curves(loss, recorded, "train_loss", "training loss")
    plots.curves(accuracy, recorded, "val_accuracy", "held-out accuracy (%)", scale=100)
    # With the first epochs in range, the differences at the end would be invisible.
    reached = [100 * row["val_accuracy"] for row in recorded]
    worst = 100 * min(row["val_accuracy"] for row in final)
    low = max(min(reached), 100 - 4 * (100 - worst))
    accuracy.set_ylim(low - 1, min(100, max(reached) + 1))
    plots.dots(last, final, "val_accuracy", "final held-out accuracy (%)", scale=100)
    # A range of at least three points, so that a few images do not look like a difference.
    low, high = last.get_ylim()
    margin = max(0, 3 - (high - low)) / 2
    last.set_ylim(low - margin, high + margin)
    plots.save(figure, picture)


if __name__ == "__main__":
    typer.run(main)
