"""Few-shot classifiers in closed form, and nearest neighbours, on frozen features.

The few-shot protocol is that of ViT-22B's authors: a ridge regression from standardised features to
targets of +1 and -1, with 1, 5, 10 and 25 images of each class (arXiv 2010.11929 and later).
Nearest neighbours vote with a weight, as in DINO's evaluation (arXiv 2104.14294).

Cost: one eigendecomposition of min(N, width + 1) rows for each draw; all values of l2 share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array, indices, numbers

# The regularisation of the protocol, and the constant column that stands for the bias.
L2 = 2.0**10
BIAS = 100.0
# Added to the standard deviation.
EPS = 1e-5
SHOTS = (1, 5, 10, 25)


def fewshot_indices(labels: Any, shots: int, seed: int, classes: int | None = None) -> Array:
    """Draw the images of a few-shot training set.

    One generator permutes the images of class 0, then of class 1, and so on. The first `shots` of
    each permutation are taken. More shots of one seed therefore contain the fewer shots.

    Args:
        labels: (N,) of all training images.
        shots: images of each class. A class with fewer images gives all of them.
        seed: of `numpy.random.default_rng`.
        classes: number of classes; default: the highest label plus one.
    Returns:
        (classes * shots,) rows, ordered by class.
    Raises:
        ValueError: a class has no image, or `shots` is below 1.
    """
    labels = indices("labels", labels, len(labels), classes)
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    generator = np.random.default_rng(seed)
    chosen = []
    for label in range(classes if classes is not None else int(labels.max()) + 1):
        rows = np.where(labels == label)[0]
        if not len(rows):
            raise ValueError(f"labels hold no image of class {label}")
        chosen.append(generator.permutation(rows)[:shots])
    return np.concatenate(chosen)


@dataclass(frozen=True)
class RidgeClassifier:
    """A linear classifier on standardised features.

    Attributes:
        weight: (width + 1, classes); the last row belongs to the constant column.
        mean: (width,) of the training features.
        std: (width,) of the training features, over N (not N - 1), plus 1e-5.
    """

    weight: Array
    mean: Array
    std: Array

    def scores(self, features: Any) -> Array:
        """Scores (N, classes) of features (N, width)."""
        return _padded(numbers("features", features, 2), self.mean, self.std) @ self.weight


def fit_ridge(
    features: Any, labels: Any, l2: float | Sequence[float] = L2, classes: int | None = None
) -> list[RidgeClassifier]:
    """Solve the ridge regression of the few-shot protocol for each value of `l2`.

    Args:
        features: (N, width).
        labels: (N,).
        l2: strength of the penalty; default 1024.
        classes: number of classes; default: the highest label plus one.
    Returns:
        One classifier for each value of `l2`.
    Raises:
        ValueError: a shape does not fit, or a value of `l2` is not positive.
    """
    x = numbers("features", features, 2)
    y = indices("labels", labels, len(x), classes)
    strengths = [float(value) for value in np.atleast_1d(np.asarray(l2, dtype=np.float64))]
    if any(not value > 0 for value in strengths):
        raise ValueError(f"l2 must be positive, got {strengths}")
    count = classes if classes is not None else int(y.max()) + 1
    mean, std = x.mean(0), x.std(0) + EPS
    z = _padded(x, mean, std)
    targets = 2.0 * np.eye(count)[y] - 1.0
    # The smaller of the two Gram matrices gives the same weights.
    wide = len(z) < z.shape[1]
    values, vectors = np.linalg.eigh(z @ z.T if wide else z.T @ z)
    right = vectors.T @ (targets if wide else z.T @ targets)
    solved = [vectors @ (right / (values + strength)[:, None]) for strength in strengths]
    return [RidgeClassifier(z.T @ w if wide else w, mean, std) for w in solved]


def fewshot_least_squares(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    *,
    shots: Sequence[int] = SHOTS,
    l2: float | Sequence[float] = L2,
    seeds: Sequence[int] = (0, 1, 2),
) -> Array:
    """Accuracy of few-shot classifiers in closed form.

    Args:
        train_features: (N, width), from which the shots are drawn.
        train_labels: (N,).
        test_features: (M, width).
        test_labels: (M,).
        shots: images of each class; default 1, 5, 10, 25.
        l2: strength of the penalty, or several; default 1024.
        seeds: of the draws; default 0, 1, 2.
    Returns:
        (values of l2, seeds, shots) accuracies, 0 to 1.
    Raises:
        ValueError: a shape does not fit, or a class has no training image.
    """
    x, test = (
        numbers("train_features", train_features, 2),
        numbers("test_features", test_features, 2),
    )
    if x.shape[1] != test.shape[1]:
        raise ValueError(
            f"train_features have the width {x.shape[1]}, test_features {test.shape[1]}"
        )
    y = indices("train_labels", train_labels, len(x))
    classes = int(y.max()) + 1
    truth = indices("test_labels", test_labels, len(test), classes)
    accuracy = np.empty((np.size(l2), len(seeds), len(shots)))
    for i, seed in enumerate(seeds):
        for j, count in enumerate(shots):
            rows = fewshot_indices(y, count, seed, classes)
            for row, fitted in enumerate(fit_ridge(x[rows], y[rows], l2, classes)):
                accuracy[row, i, j] = (fitted.scores(test).argmax(1) == truth).mean()
    return accuracy


def knn(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    k: int | Sequence[int] = 20,
    *,
    temperature: float = 0.07,
) -> Array:
    """Predict by the votes of the nearest training features in cosine similarity.

    A neighbour's vote counts exp(similarity / temperature).

    Args:
        train_features: (N, width).
        train_labels: (N,).
        test_features: (M, width).
        k: number of neighbours, or several; default 20.
        temperature: default 0.07.
    Returns:
        (M,) labels; for several values of k, (values of k, M).
    Raises:
        ValueError: k is empty or does not lie between 1 and N, or a shape does not fit.
    """
    known, x = (
        numbers("train_features", train_features, 2),
        numbers("test_features", test_features, 2),
    )
    y = indices("train_labels", train_labels, len(known))
    if known.shape[1] != x.shape[1]:
        raise ValueError(
            f"train_features have the width {known.shape[1]}, test_features {x.shape[1]}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    wanted = [int(value) for value in np.atleast_1d(np.asarray(k))]
    if not wanted:
        raise ValueError("k must hold at least one number of neighbours, got none")
    for value in wanted:
        if not 1 <= value <= len(known):
            raise ValueError(f"k={value} must lie between 1 and the {len(known)} training features")
    classes, most = int(y.max()) + 1, max(wanted)
    known = _unit(known)
    predictions = np.empty((len(wanted), len(x)), dtype=np.int64)
    for start in range(0, len(x), 1024):
        similarity = _unit(x[start : start + 1024]) @ known.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
        nearest = np.take_along_axis(similarity, order, 1)
        # Shifted by the highest similarity, so that a small temperature cannot overflow.
        weight = np.exp((nearest - nearest[:, :1]) / temperature)
        rows = np.arange(len(order))[:, None]
        for i, value in enumerate(wanted):
            votes = np.zeros((len(order), classes))
            np.add.at(votes, (rows, y[order[:, :value]]), weight[:, :value])
            predictions[i, start : start + len(order)] = votes.argmax(1)
    return predictions[0] if np.ndim(k) == 0 else predictions


def _padded(x: Array, mean: Array, std: Array) -> Array:
    """Standardised features with the constant column, (N, width + 1)."""
    if x.shape[1] != len(mean):
        raise ValueError(f"features must have the width {len(mean)}, got {x.shape[1]}")
    z = (x - mean) / std
    return np.concatenate([z, np.full((len(z), 1), BIAS)], 1)


def _unit(x: Array) -> Array:
    """Rows of length 1; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
