"""Semantic segmentation: metrics over a whole set, and inference in sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import Array, to_numpy

IGNORED = 255


@dataclass(frozen=True)
class SegmentationScores:
    """Scores over all pixels of a set.

    Attributes:
        iou: (classes,); nan for a class in neither map.
        mean_iou: mean over the other classes.
        pixel_accuracy: share of correct pixels.
        mean_accuracy: mean over the classes in the labels of their share of correct pixels.
    """

    iou: Array
    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float


def confusion_matrix(
    prediction: Any, label: Any, classes: int, ignore_index: int = IGNORED
) -> Array:
    """Pixels (classes, classes) by label (row) and prediction (column). Add those of all images.

    Args:
        prediction: class maps of any shape.
        label: class maps of the same shape.
        classes: number of classes.
        ignore_index: label of pixels that do not count; default 255.
    Raises:
        ValueError: the shapes differ, or a value is no class.
    """
    p, y = to_numpy(prediction), to_numpy(label)
    if p.shape != y.shape:
        raise ValueError(f"prediction has the shape {p.shape}, label {y.shape}")
    counted = y != ignore_index
    p, y = p[counted].astype(np.int64), y[counted].astype(np.int64)
    for name, value in (("prediction", p), ("label", y)):
        if value.size and not (value.min() >= 0 and value.max() < classes):
            raise ValueError(
                f"{name} must lie between 0 and {classes - 1}, got {value.min()} to {value.max()}"
            )
    return np.bincount(y * classes + p, minlength=classes**2).reshape(classes, classes)


def segmentation_scores(matrix: Any) -> SegmentationScores:
    """Scores of a confusion matrix that is summed over a whole set.

    A mean of the images' scores would be another number.
    """
    counts = to_numpy(matrix).astype(np.float64)
    if not counts.sum():
        raise ValueError("no pixel has a label")
    hit, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hit / (labelled + predicted - hit)
        accuracy = hit / labelled
    return SegmentationScores(
        iou,
        float(np.nanmean(iou)),
        float(hit.sum() / counts.sum()),
        float(np.nanmean(accuracy)),
    )


def window_anchors(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side: 0, stride, ..., and the last possible one."""
    if window > side or window < 1 or stride < 1:
        raise ValueError(f"a window of {window} at stride {stride} does not fit a side of {side}")
    return [*range(0, side - window, stride), side - window]


def sliding_window_logits(
    model: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int
) -> Tensor:
    """Mean logits of overlapping square windows.

    Args:
        model: windows (1, channels, window, window) to logits (1, classes, window, window).
        image: (channels, H, W). Its short side must be at least `window`.
        window: side in pixels.
        stride: in pixels.
    Returns:
        (classes, H, W).
    """
    height, width = image.shape[-2:]
    total, count = None, image.new_zeros(height, width)
    for top in window_anchors(height, window, stride):
        for left in window_anchors(width, window, stride):
            at = (slice(top, top + window), slice(left, left + window))
            logits = model(image[None, :, at[0], at[1]])[0]
            if total is None:
                total = logits.new_zeros(len(logits), height, width)
            total[:, at[0], at[1]] += logits
            count[at] += 1
    assert total is not None
    return total / count


def window_probabilities(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    window: int,
    stride: int,
    size: tuple[int, int],
) -> Tensor:
    """Probabilities (classes, *size): windowed logits, bilinear resize to the image, softmax.

    The image's short side is resized to the window first. The resize comes before the softmax.
    """
    logits = sliding_window_logits(model, image, window, stride)
    resized = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)
    return torch.softmax(resized[0], 0)
