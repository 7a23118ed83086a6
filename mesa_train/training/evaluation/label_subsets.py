"""ImageNet's test sets with other labels: A, R, v2, ReaL and ObjectNet, from 1,000 logits.

| set | labels | rule |
|---|---|---|
| imagenet-a, imagenet-r | 200 of the 1,000 classes | argmax among the 200 columns |
| imagenet-v2 | 1,000; folders are class indices | argmax of 1,000 |
| objectnet | 113 folders of 125 classes | the highest logit of a folder's classes, argmax of 113 |
| real | a list of classes for each image | a guess is right if it is in the list |

Probabilities are a softmax over the kept logits, which renormalises. Reports of A and R without the
subset (argmax of 1,000) give lower numbers.

The lists of A, R and ReaL come with timm. The list of ObjectNet is ObjectNet 1.0's mapping, as in
mlfoundations/wise-ft (MIT).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch

from .arrays import Array, indices, softmax, to_numpy
from .robustness import LabelMap

SUBSETS = ("imagenet-a", "imagenet-r", "imagenet-v2", "objectnet")
CLASSES = 1000
REAL_IMAGES = 50_000


@dataclass(frozen=True)
class SubsetScores:
    """Scores on a test set.

    Attributes:
        accuracy: 0 to 1.
        images: number of scored images.
        prediction: (images,) labels of the set.
        confidence: (images,) of the prediction, renormalised over the set's labels.
    """

    accuracy: float
    images: int
    prediction: Array
    confidence: Array


@cache
def class_list(name: str) -> dict[str, Any]:
    """A class list of this package: "objectnet_113" or "imagenet_to_16_classes"."""
    folder = resources.files("mesa_train.training.evaluation").joinpath("class_lists")
    return json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))


@cache
def subset_columns(subset: str) -> tuple[tuple[int, ...], ...]:
    """The ImageNet classes of each label of a set.

    Raises:
        ValueError: the set is unknown.
    """
    _check(subset)
    if subset == "imagenet-v2":
        return tuple((i,) for i in range(CLASSES))
    if subset == "objectnet":
        return tuple(tuple(f["imagenet"]) for f in class_list("objectnet_113")["folders"].values())
    lines = _of_timm(f"{subset.replace('-', '_')}_indices.txt").split()
    return tuple((int(line),) for line in lines)


@cache
def subset_folders(subset: str) -> tuple[str, ...]:
    """The folder names of a set in the order of its labels.

    ImageNet-v2's folders are "0" to "999": sorted as text they give wrong labels. ObjectNet has
    313 folders; the 200 that are not listed here are left out.
    """
    _check(subset)
    if subset == "imagenet-v2":
        return tuple(str(i) for i in range(CLASSES))
    if subset == "objectnet":
        return tuple(class_list("objectnet_113")["folders"])
    return tuple(_of_timm(f"{subset.replace('-', '_')}_synsets.txt").split())


def subset_logits(logits: Any, subset: str) -> Array:
    """Logits (N, labels of the set) of logits (N, 1000).

    Raises:
        ValueError: the set is unknown, or the logits have another width.
    """
    array = to_numpy(logits)
    if array.ndim != 2 or array.shape[1] != CLASSES:
        raise ValueError(f"logits must have the shape (N, {CLASSES}), got {array.shape}")
    return LabelMap(subset_columns(subset)).logits(torch.from_numpy(array)).numpy()


def label_subset_accuracy(logits: Any, labels: Any, subset: str) -> SubsetScores:
    """Score 1,000 logits on a test set with other labels.

    Args:
        logits: (N, 1000), in ImageNet's order of classes.
        labels: (N,) positions in `subset_folders(subset)`. For "real": N lists of ImageNet classes;
            images with an empty list are left out.
        subset: "imagenet-a", "imagenet-r", "imagenet-v2", "objectnet" or "real".
    Raises:
        ValueError: the set is unknown, a shape does not fit, or no image can be scored.
    """
    if subset == "real":
        return _real(logits, labels)
    kept = subset_logits(logits, subset)
    truth = indices("labels", labels, len(kept), kept.shape[1])
    prediction, confidence = kept.argmax(1), softmax(kept).max(1)
    return SubsetScores(float((prediction == truth).mean()), len(kept), prediction, confidence)


def real_accuracy(guesses: Any, labels: Sequence[Sequence[int]] | None = None) -> float:
    """Share of images with a guess among the image's ReaL labels (arXiv 2006.07159).

    Args:
        guesses: (N,) classes, or (N, k) for top-k.
        labels: N lists of classes, some empty; default: `real_labels()`, for the 50,000 validation
            images in the order of their file names.
    Returns:
        0 to 1, over the images with a label.
    Raises:
        ValueError: the numbers of images differ, or no image has a label.
    """
    known = real_labels() if labels is None else labels
    array = to_numpy(guesses)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != len(known) or array.dtype.kind not in "iu":
        raise ValueError(
            f"guesses must hold whole numbers of {len(known)} images, got the shape {array.shape} "
            f"and the dtype {array.dtype}"
        )
    hits = [
        any(int(g) in right for g in row)
        for row, right in zip(array, map(set, known), strict=True)
        if right
    ]
    if not hits:
        raise ValueError("no image has a ReaL label")
    return float(np.mean(hits))


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """The ReaL labels of ImageNet's 50,000 validation images, in the order of their file names."""
    return tuple(tuple(found) for found in json.loads(_of_timm("imagenet_real_labels.json")))


def objectnet_crop(image: Any, border: int = 2) -> Any:
    """Remove the red border of an ObjectNet image. This comes before any resize.

    Args:
        image: PIL image, or tensor or array (..., H, W).
        border: pixels on each side; default 2.
    Raises:
        ValueError: the image is not larger than its border.
    """
    is_array = hasattr(image, "shape")
    width, height = (image.shape[-1], image.shape[-2]) if is_array else image.size
    if min(width, height) <= 2 * border:
        raise ValueError(f"an image of {width}x{height} pixels has no inside of {border} pixels")
    if is_array:
        return image[..., border : height - border, border : width - border]
    return image.crop((border, border, width - border, height - border))


def resize_rule(subset: str, size: int) -> tuple[str, int]:
    """How the images of a set are resized before the central crop of `size` pixels.

    Returns:
        ("short side", pixels) keeps the aspect ratio: ImageNet-A and ObjectNet, 75 % crop.
        ("square", pixels) does not: all other sets, 87.5 % crop.
    """
    if subset in ("imagenet-a", "objectnet"):
        return "short side", round(size / 0.75)
    return "square", round(size / 0.875)


def _real(logits: Any, labels: Sequence[Sequence[int]]) -> SubsetScores:
    """Score logits on lists of labels."""
    array = to_numpy(logits)
    if array.ndim != 2 or len(array) != len(labels):
        raise ValueError(f"logits must have the shape ({len(labels)}, classes), got {array.shape}")
    scored = np.array([len(right) > 0 for right in labels], dtype=bool)
    guess, confidence = array.argmax(1), softmax(array).max(1)
    accuracy = real_accuracy(guess, labels)
    return SubsetScores(accuracy, int(scored.sum()), guess[scored], confidence[scored])


def _check(subset: str) -> None:
    if subset not in SUBSETS:
        raise ValueError(f"subset must be one of {', '.join((*SUBSETS, 'real'))}, got {subset!r}")


def _of_timm(name: str) -> str:
    """The text of a list that timm ships."""
    try:
        folder = resources.files("timm").joinpath("data").joinpath("_info")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the class lists come with timm: pip install 'mesa_train[timm]'"
        ) from error
    path = folder.joinpath(name)
    if not path.is_file():
        raise ValueError(f"this timm has no list {name}")
    return path.read_text(encoding="utf-8")
