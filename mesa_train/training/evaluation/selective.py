"""Selective prediction: a classifier that may leave the images of low confidence to somebody else.

The confidence is the probability of the top class. Images of equal confidence keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import Array, indices, probability_rows

COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)
ORACLE_FRACTIONS = (0.005, 0.01, 0.02, 0.05)


def selective_accuracy(
    probabilities: Any, labels: Any, coverage: float | Sequence[float] = COVERAGES
) -> Array:
    """Accuracy among the ceil(coverage * N) most confident images.

    Args:
        probabilities: (N, classes).
        labels: (N,).
        coverage: share of the images that are answered, in (0, 1], or several.
    Returns:
        Accuracies, 0 to 1, one for each coverage.
    Raises:
        ValueError: a coverage does not lie in (0, 1], or a shape does not fit.
    """
    right = _by_confidence(probabilities, labels)
    shares = np.atleast_1d(np.asarray(coverage, dtype=np.float64))
    if not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"coverage must lie in (0, 1], got {shares.tolist()}")
    # 0.55 * 500 is 275.00000000000006 in floating point.
    return np.array([right[: math.ceil(c * len(right) - 1e-9)].mean() for c in shares])


def area_under_risk_coverage(probabilities: Any, labels: Any) -> float:
    """Mean over k = 1..N of the error among the k most confident images. Lower is better."""
    wrong = ~_by_confidence(probabilities, labels)
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def oracle_collaborative_accuracy(
    probabilities: Any, labels: Any, fractions: float | Sequence[float] = ORACLE_FRACTIONS
) -> Array:
    """Accuracy if an oracle answers the floor(fraction * N) least confident images.

    Args:
        probabilities: (N, classes).
        labels: (N,).
        fractions: of the images, in [0, 1], or several; default 0.5, 1, 2 and 5 %.
    Returns:
        Accuracies, 0 to 1, one for each fraction.
    """
    right = _by_confidence(probabilities, labels)
    shares = np.atleast_1d(np.asarray(fractions, dtype=np.float64))
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"fractions must lie in [0, 1], got {shares.tolist()}")
    answered = [math.floor(f * len(right) + 1e-9) for f in shares]
    total = len(right)
    return np.array([(n + right[: total - n].sum()) / total for n in answered])


def correctness_auroc(probabilities: Any, labels: Any) -> float:
    """Area under the ROC curve of the confidence as a predictor of a correct answer.

    Returns:
        0 to 1; nan if all answers are right or all are wrong.
    """
    from sklearn.metrics import roc_auc_score

    p = probability_rows("probabilities", probabilities)
    right = p.argmax(1) == indices("labels", labels, len(p), p.shape[1])
    if right.all() or not right.any():
        return math.nan
    return float(roc_auc_score(right, p.max(1)))


def _by_confidence(probabilities: Any, labels: Any) -> Array:
    """Correct answers (N,), the most confident first."""
    p = probability_rows("probabilities", probabilities)
    right = p.argmax(1) == indices("labels", labels, len(p), p.shape[1])
    return right[np.argsort(-p.max(1), kind="stable")]
