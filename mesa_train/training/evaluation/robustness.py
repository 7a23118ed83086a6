"""Accuracy and calibration on sets whose labels are not the training labels: ImageNet-A and -R,
ImageNet-v2, ObjectNet and the like, given as folders.

A mapping file says, for each training label, which label of the set it counts as (YAML or JSON,
`training label: set's label`); labels that are left out take no part. Several training labels may
map to one: the set's label scores as the best of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mesa_train.utils import yaml_text


@dataclass(frozen=True)
class LabelMap:
    """columns[j]: training labels (indices) that count as the set's label j, maybe none."""

    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: Path, train_labels: Sequence[str], set_labels: Sequence[str]) -> LabelMap:
        """From a mapping file; names or indices on either side. ValueError names what is unknown."""
        if not path.is_file():
            raise ValueError(f"no mapping file {path}")
        import yaml

        try:
            entries = yaml_text.read(path.read_bytes())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f"{path} must map training labels to the set's labels")
        columns: list[list[int]] = [[] for _ in set_labels]
        for known, theirs in entries.items():
            if isinstance(theirs, yaml_text.Plain) and yaml_text.is_null(theirs):
                continue
            source = _index(known, train_labels, f"{path}: training label")
            columns[_index(theirs, set_labels, f"{path}: label of the set")].append(source)
        return cls(tuple(tuple(c) for c in columns))

    def logits(self, logits: Tensor) -> Tensor:
        """(B, training labels) to (B, labels of the set); unmapped ones are -inf."""
        mapped = [
            logits[:, list(c)].amax(1) if c else logits.new_full((len(logits),), -torch.inf)
            for c in self.columns
        ]
        return torch.stack(mapped, 1)


@dataclass(frozen=True)
class Robustness:
    """Over the images whose label is mapped: their number, accuracy, expected calibration error."""

    images: int
    left_out: int
    accuracy: float
    calibration_error: float


def evaluate(logits: Tensor, labels: Tensor, mapping: LabelMap | None = None) -> Robustness:
    """logits (N, training labels), labels (N,) of the set. ValueError if no image can be scored."""
    total = len(labels)
    if mapping is not None:
        scored = torch.tensor([bool(c) for c in mapping.columns])[labels]
        logits, labels = mapping.logits(logits[scored]), labels[scored]
    if not len(labels):
        raise ValueError("no image has a label that the mapping covers")
    confidence, guess = logits.float().softmax(-1).max(-1)
    right = guess == labels
    return Robustness(
        len(labels),
        total - len(labels),
        right.float().mean().item(),
        calibration_error(confidence, right),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in equal bins of confidence, weighted by
    how many fall in (arXiv 1706.04599)."""
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    error = 0.0
    for b in index.unique():
        inside = index == b
        gap = right[inside].float().mean() - confidence[inside].mean()
        error += (inside.float().mean() * gap.abs()).item()
    return error


def _index(name: object, known: Sequence[str], what: str) -> int:
    name = str(name) if isinstance(name, str) else name
    if str(name) in known:
        return list(known).index(str(name))
    # The text counts first: a label may be called 7 or no. JSON's keys are always in quotes.
    number = yaml_text.to_int(name) if isinstance(name, str) else None
    if number is not None and 0 <= number < len(known):
        return number
    near = difflib.get_close_matches(str(name), known, n=2)
    shown = name if number is not None else repr(name)
    raise ValueError(f"{what} {shown} is unknown" + (f"; {' or '.join(near)}?" if near else ""))
