"""Detection of images from outside the training distribution: five scores and their metrics.

A higher score means further outside. Images from outside are the positive class.

The Mahalanobis scores fit one Gaussian for each class with a shared covariance
(arXiv 1807.03888). The relative score subtracts the distance to one Gaussian of all classes
(arXiv 2106.09022). Both need features before the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array, indices, numbers, softmax

SCORES = ("msp", "mlogit", "entropy", "maha", "rmaha")


@dataclass(frozen=True)
class Gaussians:
    """Gaussians of training features.

    Attributes:
        means: (classes, width) of the classes.
        precision: (width, width), the inverse of the shared covariance.
        mean: (width,) of all features.
        overall_precision: (width, width), the inverse of the covariance of all features.
    """

    means: Array
    precision: Array
    mean: Array
    overall_precision: Array

    @classmethod
    def fit(cls, features: Any, labels: Any) -> Gaussians:
        """Fit the Gaussians to features (N, width) and labels (N,).

        Covariances divide by N. A singular covariance gets its pseudo-inverse.
        """
        x = numbers("train_features", features, 2)
        y = indices("train_labels", labels, len(x))
        # A label without images has no Gaussian.
        known, place = np.unique(y, return_inverse=True)
        means = np.stack([x[y == label].mean(0) for label in known])
        within, overall = x - means[place], x - x.mean(0)
        return cls(
            means,
            np.linalg.pinv(within.T @ within / len(x), hermitian=True),
            x.mean(0),
            np.linalg.pinv(overall.T @ overall / len(x), hermitian=True),
        )

    def class_distance(self, features: Array) -> Array:
        """Squared Mahalanobis distance (N,) to the nearest class."""
        return np.stack([_squared(features - m, self.precision) for m in self.means]).min(0)

    def overall_distance(self, features: Array) -> Array:
        """Squared Mahalanobis distance (N,) to the Gaussian of all classes."""
        return _squared(features - self.mean, self.overall_precision)


def ood_scores(
    logits: Any, features: Any = None, train_features: Any = None, train_labels: Any = None
) -> dict[str, Array]:
    """Score images by how far outside the training distribution they are.

    Args:
        logits: (N, classes).
        features: (N, width) before the classifier; without them, two scores are left out.
        train_features: (M, width), with `features`.
        train_labels: (M,), with `features`.
    Returns:
        Scores (N,) by name: "msp" is 1 - the top probability, "mlogit" is 1 - the top logit,
        "entropy" is that of the softmax in nats, "maha" is the squared Mahalanobis distance to the
        nearest class, and "rmaha" is "maha" minus the squared distance to all classes.
    Raises:
        ValueError: a shape does not fit, or one of the last three arguments is missing.
    """
    z = numbers("logits", logits, 2)
    p = softmax(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p), 0.0)
    scores = {"msp": 1 - p.max(1), "mlogit": 1 - z.max(1), "entropy": -terms.sum(1)}
    given = [value is not None for value in (features, train_features, train_labels)]
    if not any(given):
        return scores
    if not all(given):
        raise ValueError("features, train_features and train_labels must be given together")
    x = numbers("features", features, 2)
    if len(x) != len(z):
        raise ValueError(f"features have {len(x)} rows, logits {len(z)}")
    fitted = Gaussians.fit(train_features, train_labels)
    if x.shape[1] != len(fitted.mean):
        raise ValueError(f"features have the width {x.shape[1]}, train_features {len(fitted.mean)}")
    scores["maha"] = fitted.class_distance(x)
    scores["rmaha"] = scores["maha"] - fitted.overall_distance(x)
    return scores


def detection_metrics(inside: Any, outside: Any) -> dict[str, float]:
    """Metrics of one score. Images from outside are the positive class.

    Args:
        inside: (N,) scores of images from the training distribution.
        outside: (M,) scores of images from outside.
    Returns:
        "auroc", "auprc" (average precision) and "fpr95" (false positive rate at the first threshold
        with a true positive rate of at least 95 %), 0 to 1.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    low, high = numbers("inside", inside, 1), numbers("outside", outside, 1)
    score = np.concatenate([low, high])
    truth = np.concatenate([np.zeros(len(low)), np.ones(len(high))])
    false_rate, true_rate, _ = roc_curve(truth, score, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, score)),
        "auprc": float(average_precision_score(truth, score)),
        "fpr95": float(false_rate[np.argmax(true_rate >= 0.95)]),
    }


def _squared(x: Array, precision: Array) -> Array:
    """x' P x of each row."""
    return ((x @ precision) * x).sum(1)
