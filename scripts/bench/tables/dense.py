"""Table of detection and segmentation: saved bytes per method."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origin, origins, table


@table("dense.jsonl", "python scripts/bench/dense.py")
def dense(rows: Sequence[Row]) -> str:
    """The newest rows, a line per model and backbone."""
    newest = {
        (row["model"], row["backbone"], row["dtype"], row["method"]): row
        for row in sorted(rows, key=lambda row: row["dtype"] != "float32")
    }
    methods = list(dict.fromkeys(method for *_, method in newest))
    lines = []
    for key in dict.fromkeys(key[:3] for key in newest):
        of_model = {method: row for (*own, method), row in newest.items() if (*own,) == key}
        plain = of_model["plain"]
        cells = [_cell(of_model.get(method), plain) for method in methods]
        size = f"{plain['batch_size']} x {plain['height']} x {plain['width']}"
        parts = ", ".join(format_bytes(plain["parts"][part]) for part in ("body", "neck", "head"))
        lines.append([*key[:2], size, key[2], cells[0], parts, *cells[1:]])
    head = ["model", "backbone", "images", "dtype", "plain saves", "in body, neck, head and loss"]
    head += [f"{method} saves" for method in methods if method != "plain"]
    return markdown(head, lines) + (
        "\nCounted on fake tensors, in float32 or under autocast, including what the losses save. An R-CNN has 512 "
        "regions per image; Mask R-CNN has masks of 128 of them. `open_world_rcnn` is without its clustering "
        "loss. `:w4` is a window of 4 in stage 3. `+loss` computes the loss again in the backward. "
        "`checkpoint` recomputes every block of the body. "
        f"{origins([*newest.values()])}\n"
    )


def _cell(row: Row | None, plain: Row) -> str:
    """Bytes of a row, and how many times less than plain's; empty without a row."""
    if row is None:
        return ""
    size = format_bytes(row["saved_bytes"])
    ratio = plain["saved_bytes"] / row["saved_bytes"]
    return size if row is plain else f"{size} ({ratio:.2f}x less)"


@table("dense_training.jsonl", "python scripts/bench/dense_training.py")
def dense_training(rows: Sequence[Row]) -> str:
    """A line per task and policy: means over seeds, with the range."""
    newest = {(row["task"], row["policy"], row["seed"]): row for row in rows}
    groups: dict[tuple[str, str], list[Row]] = {}
    for (task, policy, _), row in sorted(
        newest.items(), key=lambda item: (item[0][0], -ord(item[0][1][0]))
    ):
        groups.setdefault((task, policy), []).append(row)
    lines = []
    for (task, policy), runs in groups.items():
        scores = [
            _METRICS[name].format(_spread(runs, name)) for name in _METRICS if name in runs[0]
        ]
        saved = format_bytes(runs[0]["saved_bytes"])
        seeds = ", ".join(str(run["seed"]) for run in runs)
        loss = f"{sum(run['train_loss'] for run in runs) / len(runs):.4f}"
        steps = f"{runs[0]['steps']}"
        lines.append([task, policy, seeds, steps, saved, loss, "; ".join(scores)])
    head = ["quickstart", "policy", "seeds", "steps", "saves", "training loss", "held-out scores"]
    pictures = f"{rows[-1]['pictures']} training and {rows[-1]['held_out']} held-out pictures"
    return markdown(head, lines) + (
        f"\nMeans over seeds, and the lowest and highest. {pictures}, digits on photographs. The training loss is the "
        f"mean over the steps since the evaluation before the last. {origin(rows[-1])}\n"
    )


_METRICS = {"ap": "AP {}", "ap50": "AP50 {}", "miou": "mIoU {}", "pixel_accuracy": "pixels {}"}


def _spread(runs: Sequence[Row], name: str) -> str:
    """Mean, lowest and highest in per cent."""
    values = [100 * run[name] for run in runs]
    mean = sum(values) / len(values)
    return f"{mean:.1f} % ({min(values):.1f} to {max(values):.1f})"
