"""Table of detection and segmentation: saved bytes per method."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origin, table


@table("dense.jsonl", "python scripts/bench/dense.py")
def dense(rows: Sequence[Row]) -> str:
    """The newest rows, a line per model and backbone."""
    newest = {(row["model"], row["backbone"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in newest.values()))
    lines = []
    for model, backbone in dict.fromkeys((model, backbone) for model, backbone, _ in newest):
        of_model = {
            m: newest[model, backbone, m] for m in methods if (model, backbone, m) in newest
        }
        plain = of_model["plain"]
        cells = [_cell(of_model.get(method), plain) for method in methods]
        size = f"{plain['batch_size']} x {plain['height']} x {plain['width']}"
        parts = ", ".join(format_bytes(plain["parts"][part]) for part in ("body", "neck", "head"))
        lines.append([model, backbone, size, cells[0], parts, *cells[1:]])
    head = ["model", "backbone", "images", "plain saves", "in body, neck, head and loss"]
    head += [f"{method} saves" for method in methods if method != "plain"]
    return markdown(head, lines) + (
        "\nCounted on fake tensors in float32, including what the losses save. Mask R-CNN has 512 regions per image, "
        "128 of them with masks. `+loss` computes the loss again in the backward. "
        "`checkpoint` recomputes every block of the body. "
        f"{origin(rows[-1])}\n"
    )


def _cell(row: Row | None, plain: Row) -> str:
    """Bytes of a row, and how many times less than plain's; empty without a row."""
    if row is None:
        return ""
    size = format_bytes(row["saved_bytes"])
    ratio = plain["saved_bytes"] / row["saved_bytes"]
    return size if row is plain else f"{size} ({ratio:.2f}x less)"
