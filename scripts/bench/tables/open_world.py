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


_DECISIONS = {
    "off": "off",
    "known_tail_proposals": "known_tail, of proposals",
    "known_tail": "known_tail, lowest 5 %",
    "known_tail_20": "known_tail, lowest 20 %",
    "two_fits": "two_fits",
    "transductive": "two_fits, transductive",
}


@table("open_world.jsonl", "python scripts/bench/open_world.py")
def open_world(rows: Sequence[Row]) -> str:
    """A line per variant and policy without energies: the means over seeds."""
    lines = []
    order = list(_NAMES)
    without = [row for row in rows if row["energy"] == "off"]
    rows = sorted(without, key=lambda r: (order.index(r["variant"]), r["name"] != "plain"))
    for (variant, policy), own in group_by(rows, "variant", "name").items():
        stages = {stage: found for (stage,), found in group_by(own, "stage").items()}
        # A baseline may have been trained on the first task alone.
        first, before, last = (stages.get(n, []) for n in ("t1_train", "t2_train", "t2_ft"))
        lines.append(
            [
                f"{_NAMES[variant]}, {policy}",
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


@table("open_world.jsonl", "python scripts/bench/open_world.py --energies ...")
def open_world_energies(rows: Sequence[Row]) -> str:
    """A line per decision by energies: the means over the finished runs of ORE after the last task."""
    last = [r for r in rows if r["variant"] == "ore" and r["stage"] == "t2_ft"]
    decided = [r for r in last if r["energy"] != "off"]
    runs = {(r["name"], r["seed"]) for r in decided}
    # A decision is compared with the same runs without one.
    same = [r for r in last if (r["name"], r["seed"]) in runs]
    lines = []
    for energy, text in _DECISIONS.items():
        own = [row for row in same if row["energy"] == energy]
        if own:
            cells = [_mean(own, name) for name in ("map_known", "unknown_recall", "wi")]
            lines.append([text, _mean(own, "aose", factor=1, digits=0), *cells])
    head = ["decision", "A-OSE", "mAP of known classes", "unknown recall", "WI"]
    return markdown(head, lines) + (
        f"\nMean and range over {len(runs)} runs of the quickstart's ORE, plain and mesa8, after the last task; "
        f"A-OSE is a number of detections, the others are in per cent. {origins(same)}\n"
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
