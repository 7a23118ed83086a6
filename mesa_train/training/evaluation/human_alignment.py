"""Agreement of a classifier with humans: shape bias, consistency, accuracy (arXiv 2106.07411).

The 16 classes are airplane, bear, ... truck in alphabetical order; each stands for 1 to 109
ImageNet classes. A response is the index of a class. A human's missing answer is 16 (`NO_ANSWER`)
and counts as wrong.

The benchmark averages over the conditions of a set, then over humans, then over the sets. Some
conditions are left out, because they are a control or too hard (`HumanData.left_out`).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array, flags, indices, numbers, probability_rows
from .label_subsets import CLASSES, class_list

NO_ANSWER = 16
CUE_CONFLICT = "cue-conflict"


def sixteen_classes() -> dict[str, tuple[int, ...]]:
    """ImageNet indices of the 16 classes, by name, in alphabetical order."""
    found = class_list("imagenet_to_16_classes")["classes"]
    return {name: tuple(entry["indices"]) for name, entry in found.items()}


def sixteen_class_decision(probabilities: Any) -> Array:
    """Decide among the 16 classes by the mean probability of their ImageNet classes.

    The sum instead of the mean would favour the classes with many ImageNet classes.

    Args:
        probabilities: (N, 1000), of a softmax.
    Returns:
        (N,) responses, 0 to 15.
    """
    p = probability_rows("probabilities", probabilities)
    if p.shape[1] != CLASSES:
        raise ValueError(f"probabilities must have {CLASSES} columns, got {p.shape[1]}")
    means = [p[:, list(columns)].mean(1) for columns in sixteen_classes().values()]
    return np.stack(means, 1).argmax(1)


def shape_bias(response: Any, shape: Any, texture: Any) -> float:
    """Share of decisions for the shape among decisions for the shape or the texture.

    Images whose shape and texture are the same class are left out.

    Args:
        response: (N,) responses to images with conflicting cues.
        shape: (N,) classes of the shapes.
        texture: (N,) classes of the textures.
    Returns:
        0 to 1; nan if no decision is for either.
    """
    hits_shape, hits_texture = cue_hits(response, shape, texture)
    total = hits_shape.sum() + hits_texture.sum()
    return float(hits_shape.sum() / total) if total else float("nan")


def cue_hits(response: Any, shape: Any, texture: Any) -> tuple[Array, Array]:
    """Decisions for the shape and for the texture, (N',) each, of the images in conflict."""
    length = len(response)
    r = indices("response", response, length)
    s, t = indices("shape", shape, length), indices("texture", texture, length)
    conflict = s != t
    return (r == s)[conflict], (r == t)[conflict]


def observed_consistency(correct_a: Any, correct_b: Any) -> float:
    """Share of trials that both observers get right or both get wrong.

    Args:
        correct_a: (N,) whether the first observer is right.
        correct_b: (N,) the same trials of the second observer.
    """
    a = flags("correct_a", correct_a)
    return float((a == flags("correct_b", correct_b, len(a))).mean())


def error_consistency(correct_a: Any, correct_b: Any) -> float:
    """Cohen's kappa of right and wrong: (observed - expected) / (1 - expected) consistency.

    The expected consistency is that of independent observers with the same accuracies. Two
    observers that agree on all trials have 1.

    Args:
        correct_a: (N,) whether the first observer is right.
        correct_b: (N,) the same trials of the second observer.
    """
    a = flags("correct_a", correct_a)
    b = flags("correct_b", correct_b, len(a))
    observed = (a == b).mean()
    if observed == 1.0:
        return 1.0
    p, q = a.mean(), b.mean()
    expected = p * q + (1 - p) * (1 - q)
    return float((observed - expected) / (1 - expected))


def accuracy_difference(correct_a: Any, correct_b: Any) -> float:
    """The squared difference of two observers' accuracies.

    Args:
        correct_a: (N,) whether the first observer is right.
        correct_b: (M,) whether the second observer is right.
    """
    a, b = flags("correct_a", correct_a), flags("correct_b", correct_b)
    return float((a.mean() - b.mean()) ** 2)


@dataclass(frozen=True)
class HumanSet:
    """The human trials of one stimulus set. All observers see the same images.

    Attributes:
        response: (observers, images), 0 to 15 or `NO_ANSWER`.
        category: (images,) the right classes.
        condition: (images,) positions in `conditions`.
        conditions: names of the conditions.
        left_out: names of the conditions that the benchmark leaves out.
        image_id: (images,) ends of the stimuli's file names.
        texture: (images,) classes of the textures; cue-conflict alone.
    """

    response: Array
    category: Array
    condition: Array
    conditions: tuple[str, ...]
    left_out: tuple[str, ...]
    image_id: Array
    texture: Array | None = None

    def counted(self) -> list[Array]:
        """The rows of each condition that counts."""
        kept = [i for i, name in enumerate(self.conditions) if name not in self.left_out]
        rows = [self.condition == i for i in kept]
        return [mask for mask in rows if mask.any()]


def read_human_data(path: str | Path) -> dict[str, HumanSet]:
    """Read the packed trials of model-vs-human's 17 sets.

    Args:
        path: an npz file with `NAME/response`, `NAME/category`, `NAME/condition`, `NAME/image_id`
            and `meta`.
    Raises:
        ValueError: the file is missing or has another content.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file {path} with human responses")
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            return {
                name: HumanSet(
                    response=file[f"{name}/response"].astype(np.int64),
                    category=file[f"{name}/category"].astype(np.int64),
                    condition=file[f"{name}/condition"].astype(np.int64),
                    conditions=tuple(map(str, about["conditions"])),
                    left_out=tuple(map(str, about["left_out"])),
                    image_id=file[f"{name}/image_id"],
                    texture=file[f"{name}/texture"].astype(np.int64)
                    if f"{name}/texture" in file
                    else None,
                )
                for name, about in meta["datasets"].items()
            }
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no human responses: {error}") from None


@dataclass(frozen=True)
class Alignment:
    """Agreement with humans on a set, or its mean over sets."""

    observed_consistency: float
    error_consistency: float
    accuracy_difference: float
    ood_accuracy: float


def align(response: Any, human: HumanSet) -> Alignment:
    """Compare a model's responses to one stimulus set with those of all its observers.

    Args:
        response: (images,) in the order of `human`.
        human: the set.
    """
    r = indices("response", response, len(human.category), NO_ANSWER + 1)
    return _against(r == human.category, list(human.response), human)


def align_humans(human: HumanSet) -> Alignment:
    """Compare the observers of a set with each other: every pair, and their mean accuracy."""
    correct = [r == human.category for r in human.response]
    found = []
    for i, own in enumerate(correct):
        others = [r for j, r in enumerate(human.response) if j > i]
        if others:
            found.append((len(others), _against(own, others, human)))
    pairs = sum(count for count, _ in found)

    def over_pairs(name: str) -> float:
        return sum(count * getattr(one, name) for count, one in found) / pairs

    return Alignment(
        over_pairs("observed_consistency"),
        over_pairs("error_consistency"),
        over_pairs("accuracy_difference"),
        float(np.mean([_pooled_accuracy(own, human) for own in correct])),
    )


def mean_alignment(scores: Mapping[str, Alignment]) -> Alignment:
    """The mean over sets."""
    values = numbers("scores", [list(vars(s).values()) for s in scores.values()], 2)
    return Alignment(*map(float, values.mean(0)))


def _against(correct: Array, observers: list[Array], human: HumanSet) -> Alignment:
    """Mean over conditions, then over observers."""
    rows = human.counted()
    table = []
    for response in observers:
        theirs = response == human.category
        pairs = [(correct[mask], theirs[mask]) for mask in rows]
        table.append(
            [
                np.mean([measure(a, b) for a, b in pairs])
                for measure in (observed_consistency, error_consistency, accuracy_difference)
            ]
        )
    means = np.mean(table, axis=0)
    observed, beyond_chance, difference = map(float, means)
    return Alignment(observed, beyond_chance, difference, _pooled_accuracy(correct, human))


def _pooled_accuracy(correct: Array, human: HumanSet) -> float:
    """Accuracy over the images of all conditions that count."""
    return float(correct[np.any(human.counted(), axis=0)].mean())
