"""The table about training to the end."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

import torch

from mesa_train.report.columns import in_order
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origins, table


@table("train_parity.jsonl", "python scripts/bench/train_parity.py")
def parity(rows: Sequence[Row]) -> str:
    """For each model, data and device, the runs to the end with the newest settings."""
    named = ("model", "data", "device")
    newest = {tuple(row["settings"][name] for name in named): row["settings"] for row in rows}
    return "\n".join(
        _training([row for row in rows if row["settings"] == settings])
        for settings in reversed(newest.values())
    )


def _training(rows: Sequence[Row]) -> str:
    """The last epoch of all runs with one setting, a line per policy."""
    settings = rows[-1]["settings"]
    final = in_order(row for row in rows if row["epoch"] == settings["epochs"])
    with_distance = any("weight_distance" in row for row in final)
    head = ["policy", "saved for the backward", "final training loss", "held-out accuracy"]
    head += ["seeds", *(["distance of the weights"] if with_distance else [])]
    lines = []
    for (name,), of_policy in records.group_by(final, "name").items():
        of_policy.sort(key=lambda row: row["seed"])
        accuracies = [100 * row["val_accuracy"] for row in of_policy]
        spread = statistics.stdev(accuracies) if len(of_policy) > 1 else 0.0
        line = [
            name,
            format_bytes(of_policy[0]["saved_bytes"]),
            f"{statistics.fmean(row['train_loss'] for row in of_policy):.4f}",
            f"{statistics.fmean(accuracies):.2f} ± {spread:.2f} %",
            ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
        ]
        if with_distance:
            distances = [row["weight_distance"] for row in of_policy if "weight_distance" in row]
            cell = f"{statistics.fmean(distances):.3f}" if distances else ""
            if 0 < len(distances) < len(of_policy):
                cell += f" ({len(distances)} of {len(of_policy)} seeds)"
            line.append(cell)
        lines.append(line)
    explained = (
        "Distance: between the last weights and plain's with the same seed, as a share of plain's way from its "
        "first weights; `perturbed` is plain with first weights that differ by a millionth. "
        if with_distance
        else ""
    )
    return markdown(head, lines) + (
        f"\n{settings['model']}{_parameters(final)} from scratch on {settings['train_images']:,} images of "
        f"{settings['data']}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{'float32' if settings['autocast'] == 'None' else settings['autocast'] + ' autocast'}; "
        f"mean and standard deviation over seeds. {explained}{origins(final)}\n"
    )


def _parameters(rows: Sequence[Row]) -> str:
    """The parameters of the model in brackets, such as " (1.2 M parameters)".

    Rows of older runs have no count. The model is then built and counted.
    """
    settings = rows[-1]["settings"]
    counts = [row["parameters"] for row in rows if "parameters" in row]
    count = counts[-1] if counts else _counted(settings["model"], settings["data"])
    return "" if count is None else f" ({count / 1e6:.1f} M parameters)"


# Channels and size of the images.
_IMAGES = {"cifar10": (3, 32), "mnist5k": (1, 28), "digits": (1, 8)}


@functools.cache
def _counted(model: str, data: str) -> int | None:
    """The parameters of a model for a set of ten classes, or None for an unknown set."""
    from mesa_train.training import small_models
    from mesa_train.training.data.packaged import ImageSet, Split

    if data not in _IMAGES:
        return None
    channels, size = _IMAGES[data]
    split = Split(
        torch.zeros(1, channels, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    )
    images = ImageSet(data, split, split, num_classes=10, mean=0.0, std=1.0)
    module, _ = small_models.build(model, images, seed=0)
    return sum(p.numel() for p in module.parameters())
