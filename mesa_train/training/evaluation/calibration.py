"""Calibration of a classifier: calibration errors, likelihood, Brier score, temperature.

Definitions differ between libraries. Here:

- A confidence falls into bin floor(confidence * bins); a confidence of 1 falls into the last bin.
  torchmetrics puts a confidence of exactly 1 into an extra bin.
- The Brier score is summed over classes, so it lies in [0, 2]. Some libraries halve it or divide it
  by the number of classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array, flags, indices, numbers, probability_rows, to_numpy

NORMS = ("l1", "l2")


def expected_calibration_error(
    probabilities: Any,
    labels: Any,
    *,
    bins: int = 15,
    adaptive: bool = False,
    norm: str = "l1",
) -> float:
    """Calibration error of the top class (arXiv 1706.04599).

    l1: sum over bins of n / N * |accuracy - confidence|. l2: the root of the sum of
    n / N * (accuracy - confidence)^2.

    Args:
        probabilities: (N, classes), of a softmax or of sigmoids.
        labels: (N,).
        bins: default 15. NaViT's table has 30.
        adaptive: bins hold equally many images; default: bins are equally wide.
        norm: "l1" or "l2"; default "l1".
    Returns:
        The error, 0 to 1.
    Raises:
        ValueError: an argument does not fit.
    """
    p = probability_rows("probabilities", probabilities)
    y = indices("labels", labels, len(p), p.shape[1])
    return binned_error(p.max(1), p.argmax(1) == y, bins=bins, adaptive=adaptive, norm=norm)


def binned_error(
    confidence: Any, correct: Any, *, bins: int = 15, adaptive: bool = False, norm: str = "l1"
) -> float:
    """Calibration error of confidences (N,) and correct answers (N,).

    The other arguments are those of `expected_calibration_error`.
    """
    confidence = numbers("confidence", confidence, 1)
    correct = flags("correct", correct, len(confidence))
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    gaps, shares = _gaps(confidence, correct, _bins(confidence, bins, adaptive), len(confidence))
    if norm == "l2":
        return float(np.sqrt((shares * gaps**2).sum()))
    return float((shares * np.abs(gaps)).sum())


def static_calibration_error(probabilities: Any, labels: Any, *, bins: int = 15) -> float:
    """Calibration error of all classes, not of the top class alone (arXiv 1904.01685).

    Each class is a binary problem with its own equal bins. The l1 errors are averaged over classes.

    Args:
        probabilities: (N, classes).
        labels: (N,).
        bins: default 15.
    """
    p = probability_rows("probabilities", probabilities)
    y = indices("labels", labels, len(p), p.shape[1])
    return float(np.mean([binned_error(p[:, c], y == c, bins=bins) for c in range(p.shape[1])]))


def reliability(probabilities: Any, labels: Any, *, bins: int = 15) -> dict[str, Array]:
    """Points of a reliability diagram.

    Returns:
        "confidence", "accuracy" and "share" of each bin that holds an image.
    """
    p = probability_rows("probabilities", probabilities)
    y = indices("labels", labels, len(p), p.shape[1])
    top, right = p.max(1), p.argmax(1) == y
    place = _bins(top, bins, adaptive=False)
    used = np.unique(place)
    return {
        "confidence": np.array([top[place == b].mean() for b in used]),
        "accuracy": np.array([right[place == b].mean() for b in used]),
        "share": np.array([(place == b).mean() for b in used]),
    }


def negative_log_likelihood(probabilities: Any, labels: Any) -> float:
    """Mean of -log p(label). Infinite if a label has the probability 0.

    Args:
        probabilities: (N, classes).
        labels: (N,).
    """
    p = probability_rows("probabilities", probabilities)
    y = indices("labels", labels, len(p), p.shape[1])
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(p)), y]).mean())


def brier(probabilities: Any, labels: Any) -> float:
    """Brier score: the squared distance to the one-hot label, summed over classes, 0 to 2.

    Args:
        probabilities: (N, classes).
        labels: (N,).
    """
    p = probability_rows("probabilities", probabilities)
    y = indices("labels", labels, len(p), p.shape[1])
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


def temperature(logits: Any, labels: Any) -> float:
    """The temperature that minimises the negative log-likelihood of softmax(logits / temperature).

    Fit it on held-out images, not on the images that are then scored.

    Args:
        logits: (N, classes).
        labels: (N,).
    Returns:
        The temperature, between 1e-3 and 1e3.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    z = numbers("logits", logits, 2)
    y = indices("labels", labels, len(z), z.shape[1])
    rows = np.arange(len(z))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(z / np.exp(log_temperature), axis=1)[rows, y].mean())

    # The likelihood is convex in 1 / temperature, so it has one minimum in the logarithm too.
    bound = np.log(1e3)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x))


def sigmoid_confidences(logits: Any) -> Array:
    """Sigmoids (N, classes) of logits, for models trained with one sigmoid for each class."""
    from scipy.special import expit

    return expit(to_numpy(logits).astype(np.float64))


def _bins(confidence: Array, bins: int, adaptive: bool) -> Array:
    """The bin of each confidence."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if adaptive:
        places = np.round(np.linspace(0, len(confidence), bins, endpoint=False)).astype(int)
        edges = np.sort(confidence)[np.minimum(places, len(confidence) - 1)][1:]
        return np.digitize(confidence, edges)
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def _gaps(confidence: Array, correct: Array, place: Array, total: int) -> tuple[Array, Array]:
    """(accuracy - confidence, share of the images) of each bin that holds an image."""
    counts = np.bincount(place)
    used = counts > 0
    gaps = np.bincount(place, correct.astype(np.float64)) - np.bincount(place, confidence)
    return gaps[used] / counts[used], counts[used] / total
