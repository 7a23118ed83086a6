"""Tables of the evaluation of several models, and of segmentation on fractions of the data."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.records import Row
from tables.text import markdown, origin, table

# Task, metric, and the words of the table.
METRICS = {
    ("probe", "top-1 accuracy"): "probe: top-1 accuracy",
    ("fewshot", "1-shot accuracy"): "fewshot: 1-shot accuracy",
    ("fewshot", "25-shot accuracy"): "fewshot: 25-shot accuracy",
    ("knn", "k = 10"): "knn: k = 10",
    ("knn", "k = 200"): "knn: k = 200",
    ("calibration", "ECE, 15 bins"): "calibration: ECE, 15 bins",
    ("calibration", "ECE after the temperature"): "calibration: ECE after the temperature",
    ("probe", "top-1 of the model's classifier"): "its own classifier: top-1 accuracy",
}


@table("evaluation.jsonl", "python scripts/bench/evaluation.py runs/evaluate/report.json")
def evaluation(rows: Sequence[Row]) -> str:
    """The newest report of several models, a column for each."""
    models, found = rows[-1]["models"], rows[-1]["rows"]
    lines = [
        [words, *["-" if v is None else f"{100 * v:.1f} %" for v in line["values"]]]
        for (task, metric), words in METRICS.items()
        for line in found
        if (line["task"], line["metric"]) == (task, metric)
    ]
    head = ["", *[f"`{m['model']}`, {m['image size']}" for m in models]]
    first = models[0]
    return markdown(head, lines) + (
        f"\n{first['training images']} and {first['held-out images']}, float32, seed 0. "
        f"{first['device']}, {first['versions']}, commit {first['commit']}, {first['date'][:10]}.\n"
    )


@table("data_fractions.jsonl", "python scripts/bench/data_fractions.py")
def data_fractions(rows: Sequence[Row]) -> str:
    """The newest row of each fraction."""
    newest = {row["fraction"]: row for row in rows}
    lines = [
        [
            f"1/{round(1 / fraction)}" if fraction < 1 else "1",
            str(row["pictures"]),
            str(row["steps"]),
            f"{100 * row['mean_iou']:.1f} %",
            f"{100 * row['pixel_accuracy']:.1f} %",
        ]
        for fraction, row in sorted(newest.items())
    ]
    last = rows[-1]
    return markdown(["fraction", "pictures", "steps", "mean IoU", "pixel accuracy"], lines) + (
        f"\n`{last['file']}`, {last['policy']}. All fractions have the same number of crops: a small "
        f"fraction repeats its pictures. The commonest class everywhere: "
        f"{100 * last['mean_iou_of_commonest']:.1f} %. Seed {last['seed']}. {origin(last)}\n"
    )
