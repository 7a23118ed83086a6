"""Tables about the efficient models: saved bytes, quickstarts, and parity over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import Table, markdown, origin, table
from tables.training import parity


@table("efficient.jsonl", "python scripts/bench/efficient.py", "precision")
def efficient_memory(rows: Sequence[Row]) -> str:
    """The newest row of each model, a column for each method."""
    newest = {row["model"]: row for row in rows}
    methods = list(rows[-1]["saved_bytes"])
    lines = []
    for model, row in newest.items():
        sizes = row["saved_bytes"]
        cells = [
            f"{format_bytes(sizes[method])} ({sizes['plain'] / sizes[method]:.2f}x)"
            for method in methods[1:]
        ]
        lines.append([f"`{model}`", format_bytes(sizes["plain"]), *cells])
    row = rows[-1]
    precision = "float32" if row["precision"] == "float32" else "bf16 autocast"
    return markdown(["model", *methods], lines) + (
        f"\nBatch {row['batch_size']}, {row['image_size']} px, {precision}, counted on fake tensors; in "
        f"brackets how many times less than plain. {origin(row)}\n"
    )


@table("quickstarts.jsonl", "python scripts/bench/quickstarts.py")
def quickstarts(rows: Sequence[Row]) -> str:
    """The newest row of each quickstart."""
    newest = {row["name"]: row for row in rows}
    lines = []
    for name, row in newest.items():
        predicted, measured = row["predicted"], row["measured"]
        without_images = sum(predicted.values()) - predicted["images"]
        lines.append(
            [
                f"`{name}`",
                str(row["steps"]),
                f"{row['top1']:.1%}",
                f"step {row['killed_after']}: {'same' if row['same'] else 'differs'}",
                f"{format_bytes(predicted['activations'])} / {format_bytes(measured['activations'])}",
                f"{format_bytes(without_images)} / {format_bytes(measured['peak'])}",
            ]
        )
    head = ["quickstart", "steps", "top-1", "killed after, resumed", "saved bytes", "peak"]
    return markdown(head, lines) + (
        "\nTop-1 of the last epoch, on images that were held out. Killed: by SIGKILL after the given step. "
        "`same`: the resumed run and the whole run have the same scores and weights, bit for bit. Bytes: "
        "predicted by a dry run / measured in a real step. The measured peak also has the workspace of "
        f"kernels. {origin(rows[-1])}\n"
    )


efficient_parity = Table(
    parity.render,
    "efficient_parity.jsonl",
    "python scripts/bench/train_parity.py --model hvt_ti_1 --data digits --float32 --epochs 5 "
    "--batch-size 32 --policies plain,mesa8 --out docs/results/efficient_parity.jsonl",
    (),
)
