"""Accuracy and calibration on image sets whose labels differ from the training labels.

Such sets are ImageNet-A and -R, ImageNet-v2 and ObjectNet, given as folders. A mapping file (YAML
or JSON, `training label: set's label`) gives the set's label for each training label. Training
labels that are not in the file are ignored. If several training labels map to one label, the best
of them gives its score.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mesa_train.utils import yaml_text

from .calibration import binned_error


@dataclass(frozen=True)
class LabelMap:
    """Mapping from training labels to the labels of an image set.

    Attributes:
        columns: columns[j] holds the indices of the training labels that count as the set's label
            j; may be empty.
    """

    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: Path, train_labels: Sequence[str], set_labels: Sequence[str]) -> LabelMap:
        """Read a mapping file. Both sides may be names or indices.

        Raises:
            ValueError: the file is missing or malformed, or a label is unknown.
        """
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
        """Map logits to the labels of the set: (B, training labels) to (B, labels of the set).

        Labels without a mapping get -inf.
        """
        mapped = [
            logits[:, list(c)].amax(1) if c else logits.new_full((len(logits),), -torch.inf)
            for c in self.columns
        ]
        return torch.stack(mapped, 1)


@dataclass(frozen=True)
class Robustness:
    """Scores over the images whose label is mapped.

    Attributes:
        images: number of scored images.
        left_out: number of images without a mapping.
        accuracy: 0 to 1.
        calibration_error: expected calibration error, 0 to 1.
    """

    images: int
    left_out: int
    accuracy: float
    calibration_error: float


def evaluate(logits: Tensor, labels: Tensor, mapping: LabelMap | None = None) -> Robustness:
    """Score logits on an image set.

    Args:
        logits: (N, training labels).
        labels: (N,) of the set.
        mapping: default: the labels are the training labels.
    Raises:
        ValueError: no image can be scored.
    """
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
    """Expected calibration error (arXiv 1706.04599).

    It is |accuracy - confidence| in equal bins of confidence, weighted by the images in each bin.
    """
    return binned_error(confidence, right, bins=bins)


def _index(name: object, known: Sequence[str], what: str) -> int:
    """The index of a label that is given by name or number. ValueError if it is unknown."""
    name = str(name) if isinstance(name, str) else name
    if str(name) in known:
        return list(known).index(str(name))
    # A name is tried before a number: a label may be called 7 or no. JSON's keys are always quoted.
    number = yaml_text.to_int(name) if isinstance(name, str) else None
    if number is not None and 0 <= number < len(known):
        return number
    near = difflib.get_close_matches(str(name), known, n=2)
    shown = name if number is not None else repr(name)
    raise ValueError(f"{what} {shown} is unknown" + (f"; {' or '.join(near)}?" if near else ""))
