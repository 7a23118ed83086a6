"""Demographic parity of a binary classifier, and post-processing to a wanted parity.

Demographic parity is the largest difference of the mean prediction between groups. The
post-processing shifts the scores of each group so that the group's mean prediction lies within a
tolerance of the overall mean (arXiv 2106.12887). Fit it on held-out images and evaluate it on
others.

The predictions become probabilities of a positive answer. Accuracies are therefore expectations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array, flags, numbers, to_numpy

# Width of the ramp from 0 to 1. With 1 the result is that of least squares.
GAMMA = 0.05


def demographic_parity(prediction: Any, group: Any) -> float:
    """The largest difference between groups of the mean prediction.

    Args:
        prediction: (N,) 0 or 1, or probabilities of a positive answer.
        group: (N,) of any kind, one value for each group.
    Returns:
        0 (parity) to 1.
    Raises:
        ValueError: a shape does not fit, a prediction lies outside [0, 1], or there is one group.
    """
    p = _probabilities("prediction", prediction)
    rates = [p[rows].mean() for rows in _groups(group, len(p)).values()]
    return float(max(rates) - min(rates))


@dataclass(frozen=True)
class ParityShift:
    """Shifts that post-process predictions to demographic parity.

    Attributes:
        shift: of the score 2 p - 1, by group.
        rate: the overall mean prediction that the groups approach.
        gamma: width of the ramp.
    """

    shift: dict[Any, float]
    rate: float
    gamma: float

    def __call__(self, probability: Any, group: Any) -> Array:
        """New probabilities (N,) of a positive answer.

        Args:
            probability: (N,) of a positive answer.
            group: (N,).
        Raises:
            ValueError: a group was not there when the shifts were fitted.
        """
        p = _probabilities("probability", probability)
        new = np.empty_like(p)
        for name, rows in _groups(group, len(p), least=1).items():
            if name not in self.shift:
                known = ", ".join(map(str, self.shift))
                raise ValueError(f"group {name!r} is unknown; the shifts are for {known}")
            new[rows] = _ramp(2 * p[rows] - 1, self.shift[name], self.gamma)
        return new


def parity_shift(
    probability: Any, group: Any, *, tolerance: float = 0.0, gamma: float = GAMMA
) -> ParityShift:
    """Fit the shifts of `ParityShift` by bisection, separately for each group.

    A group whose mean lies within rate +- tolerance / 2 is not shifted. The mean of another group
    is moved to the nearer bound. The new mean falls as the shift grows, so there is one solution.

    Args:
        probability: (N,) of a positive answer, on held-out images.
        group: (N,).
        tolerance: the wanted demographic parity; default 0.
        gamma: width of the ramp; default 0.05; above 0.
    Raises:
        ValueError: an argument does not fit, or there is one group.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    p = _probabilities("probability", probability)
    rate = float(p.mean())
    low, high = rate - tolerance / 2, rate + tolerance / 2
    shifts = {}
    for name, rows in _groups(group, len(p)).items():
        score = 2 * p[rows] - 1
        mean = _ramp(score, 0.0, gamma).mean()
        wanted = min(max(mean, low), high)
        shifts[name] = 0.0 if mean == wanted else _bisect(score, wanted, gamma)
    return ParityShift(shifts, rate, gamma)


def expected_accuracy(probability: Any, label: Any) -> float:
    """Accuracy of randomised predictions: the mean of p for positives and of 1 - p for negatives.

    Args:
        probability: (N,) of a positive answer; 0 or 1 for predictions that are not randomised.
        label: (N,) 0 or 1.
    """
    p = _probabilities("probability", probability)
    return float(np.where(flags("label", label, len(p)), p, 1 - p).mean())


def group_accuracy(prediction: Any, label: Any, group: Any) -> dict[Any, float]:
    """Expected accuracy of each group. The arguments are those of the functions above."""
    p = _probabilities("prediction", prediction)
    truth = flags("label", label, len(p))
    return {
        name: expected_accuracy(p[rows], truth[rows])
        for name, rows in _groups(group, len(p), least=1).items()
    }


def _ramp(score: Array, shift: float, gamma: float) -> Array:
    """The new probability of scores 2 p - 1."""
    return np.clip((score - shift) / gamma, 0.0, 1.0)


def _bisect(score: Array, wanted: float, gamma: float) -> float:
    """The shift at which the mean of the ramp is `wanted`."""
    low, high = score.min() - gamma, score.max()
    for _ in range(200):
        middle = (low + high) / 2
        if _ramp(score, middle, gamma).mean() > wanted:
            low = middle
        else:
            high = middle
    return float((low + high) / 2)


def _probabilities(name: str, values: Any) -> Array:
    """Probabilities (N,)."""
    array = numbers(name, values, 1)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} must lie in [0, 1], got {array.min():g} to {array.max():g}")
    return array


def _groups(group: Any, length: int, least: int = 2) -> dict[Any, Array]:
    """The rows of each group, by its value."""
    array = to_numpy(group)
    if array.shape != (length,):
        raise ValueError(f"group must have the shape ({length},), got {array.shape}")
    names = np.unique(array)
    if len(names) < least:
        raise ValueError(f"group must hold at least {least} groups, got {names.tolist()}")
    return {name.item(): array == name for name in names}
