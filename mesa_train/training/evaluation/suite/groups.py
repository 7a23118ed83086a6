"""Images with a binary label and a group, and the lines of a report about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mesa_train.training import evaluation as metrics
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.table import read_table
from mesa_train.training.evaluation.linear_probe import linear_probe

from .images import Images, image_of, stamp

SPLITS = ("fit", "tune", "test")
# metric, value, note
Line = tuple[str, float, str]


@dataclass(frozen=True)
class Groups:
    """Images with a binary label and a group, from a CSV file.

    Attributes:
        images: with the binary labels.
        group: name of each image's group.
        split: "fit", "tune" or "test" of each image.
    """

    images: Images
    group: list[str]
    split: list[str]


def of_csv(path: Path) -> Groups:
    """Read a CSV file with the columns file, label, group, and optionally split.

    `file` is relative to the CSV's folder, `label` is 0 or 1, `split` is fit, tune or test. Without
    `split`, images go to fit, fit, tune, test in turn, after a shuffle of seed 0 and a sort by label
    and group.

    Raises:
        ConfigError: the file, a column or a value is wrong. A split lacks a label, or tune or test
            lacks a group.
    """
    rows = read_table(path, ("file", "label", "group"), "--groups")
    for number, row in enumerate(rows, start=2):
        if row["label"] not in ("0", "1"):
            raise ConfigError(
                f"--groups: {path}, line {number}: label must be 0 or 1, got {row['label']!r}"
            )
        if not (path.parent / row["file"]).is_file():
            raise ConfigError(f"--groups: {path}, line {number}: no file {row['file']}")
        if "split" in row and row["split"] not in SPLITS:
            raise ConfigError(
                f"--groups: {path}, line {number}: split must be fit, tune or test, got "
                f"{row['split']!r}"
            )
    labels, group = [row["label"] for row in rows], [row["group"] for row in rows]
    if len(set(group)) < 2 or len(rows) < 8:
        raise ConfigError(f"--groups: {path} needs two groups and at least 8 images")
    split = [row["split"] for row in rows] if "split" in rows[0] else in_turn(labels, group)
    _check_splits(path, labels, group, split)
    paths = [str(path.parent / row["file"]) for row in rows]
    images = Images(
        str(path), lambda i: image_of(paths[i]), torch.tensor([int(label) for label in labels]),
        ("0", "1"), stamp=stamp(paths),
    )  # fmt: skip
    return Groups(images, group, split)


def in_turn(labels: Sequence[str], group: Sequence[str]) -> list[str]:
    """A split of each image: fit, fit, tune, test in turn, over images of one label and group first.

    Args:
        labels: of the images.
        group: of the images.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    split = [""] * len(labels)
    for place, i in enumerate(sorted(order, key=lambda i: (labels[i], group[i]))):
        split[i] = ("fit", "fit", "tune", "test")[place % 4]
    return split


def _check_splits(
    path: Path, labels: Sequence[str], group: Sequence[str], split: Sequence[str]
) -> None:
    """ConfigError if a split lacks a label, or if tune or test lacks a group."""
    for name in SPLITS:
        rows = [i for i, own in enumerate(split) if own == name]
        lacking = [f"label {v}" for v in ("0", "1") if v not in {labels[i] for i in rows}]
        if name != "fit":
            there = {group[i] for i in rows}
            lacking += [f"group {v}" for v in sorted(set(group)) if v not in there]
        if lacking:
            raise ConfigError(
                f"--groups: {path} has no image of {' and '.join(lacking)} in the split {name}, which "
                "needs one; give more images, or a column split of fit, tune and test"
            )


def lines(groups: Groups, features: Callable[[Images], Tensor]) -> list[Line]:
    """Parity and accuracy of a binary probe by group, before and after post-processing.

    Args:
        groups: the images.
        features: of images, (N, width).
    """
    x, group = features(groups.images), np.array(groups.group)
    fit, tune, test = (np.array([own == name for own in groups.split]) for name in SPLITS)
    labels = groups.images.labels
    known, scored = torch.from_numpy(fit), torch.from_numpy(test)
    fitted = linear_probe([(x[known], labels[known])], (x[scored], labels[scored]))
    p = fitted.logits(x).double().softmax(1)[:, 1].numpy()
    y, hard = labels.numpy()[test], p[test] > 0.5
    found: list[Line] = [
        ("parity of the labels", metrics.demographic_parity(y, group[test]),
         f"{test.sum()} test images"),
        ("parity of the predictions", metrics.demographic_parity(hard, group[test]), ""),
        ("accuracy", metrics.expected_accuracy(hard, y), ""),
    ]  # fmt: skip
    by_group = metrics.group_accuracy(hard, y, group[test])
    found += [(f"accuracy of {name}", value, "") for name, value in by_group.items()]
    found.append(("gap of accuracies", max(by_group.values()) - min(by_group.values()), ""))
    for wanted in (0.1, 0.05, 0.0):
        shift = metrics.parity_shift(p[tune], group[tune], tolerance=wanted)
        new = shift(p[test], group[test])
        note = f"post-processed to a parity of {wanted:g} on {tune.sum()} other images"
        found += [
            (f"parity at {wanted:g}", metrics.demographic_parity(new, group[test]), note),
            (f"accuracy at {wanted:g}", metrics.expected_accuracy(new, y), note),
        ]
    return found
