"""Table of open-world detection: the quickstart's detector and its baselines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mesa_train.utils.records import Row, group_by
from tables.text import markdown, origins, table

_NAMES = {
    "ore": "ORE",
    "faster_rcnn": "plain Faster R-CNN",
    "labels_only": "unknown labels alone",
    "official_code": "ORE by the official code's rules",
}


@table("open_world.jsonl", "python scripts/bench/open_world.py")
def open_world(rows: Sequence[Row]) -> str:
    """A line per variant, policy and use of energies: the means over seeds."""
    lines = []
    order = list(_NAMES)
    rows = sorted(rows, key=lambda r: (order.index(r["variant"]), r["name"] != "plain"))
    for (variant, policy, energy), own in group_by(rows, "variant", "name", "energy").items():
        stages = {stage: found for (stage,), found in group_by(own, "stage").items()}
        # A baseline may have been trained on the first task alone.
        first, before, last = (stages.get(n, []) for n in ("t1_train", "t2_train", "t2_ft"))
        lines.append(
            [
                f"{_NAMES[variant]}, {policy}" + ("" if energy == "off" else f", {energy}"),
                _mean(first, "map_known"),
                _mean(first, "unknown_recall"),
                _mean(before, "map_previous"),
                _mean(last, "map_previous"),
                _mean(last, "map_current"),
                _mean(last, "unknown_recall"),
                _mean(last, "wi"),
                _mean(last, "aose", factor=1, digits=0),
                str(len({row["seed"] for row in own})),
            ]
        )
    head = ["detector", "task 1: mAP", "unknown recall", "task 2: mAP of task 1"]
    head += ["and after replay", "mAP of task 2", "unknown recall", "WI", "A-OSE", "seeds"]
    row = rows[-1]
    return markdown(head, lines) + (
        f"\nThe quickstart recipe on {row['images']} held-out pictures: AP over all points at IoU 0.5, WI at recall "
        "0.8 as the official code computes it, all in per cent. A-OSE is a number of detections. "
        f"{origins(rows)}\n"
    )


def _mean(rows: Sequence[Row], name: str, factor: float = 100, digits: int = 1) -> str:
    """The mean over seeds, and the range of several."""
    values = [factor * row[name] for row in rows if row[name] is not None]
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text
