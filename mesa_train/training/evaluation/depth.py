"""Depth estimation: metrics over all valid pixels of a set, and losses.

A pixel is valid if its true depth is above 0. The metrics are those of all pixels together; a mean
of the images' metrics would be another number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import to_numpy

DELTAS = (1.1, 1.25, 1.25**2, 1.25**3)


def depth_metrics(prediction: Any, depth: Any) -> dict[str, float]:
    """Depth metrics of predictions in the unit of the depths (metres).

    Args:
        prediction: maps of any shape, above 0 at valid pixels.
        depth: maps of the same shape; 0 is invalid.
    Returns:
        mse, mse_log1p (of log(1 + depth)), rmse, abs_rel (mean |p - g| / g), log10, and
        delta_T (share of max(p / g, g / p) < T).
    Raises:
        ValueError: the shapes differ, no pixel is valid, or a prediction is not positive.
    """
    p, g = (to_numpy(v).astype(np.float64) for v in (prediction, depth))
    if p.shape != g.shape:
        raise ValueError(f"prediction has the shape {p.shape}, depth {g.shape}")
    p, g = p[g > 0], g[g > 0]
    if not g.size:
        raise ValueError("depth has no valid pixel: all are 0 or negative")
    if not (p > 0).all():
        raise ValueError("prediction must be positive at valid pixels")
    ratio = np.maximum(p / g, g / p)
    mse = ((p - g) ** 2).mean()
    found = {
        "mse": mse,
        "mse_log1p": ((np.log1p(p) - np.log1p(g)) ** 2).mean(),
        "rmse": np.sqrt(mse),
        "abs_rel": (np.abs(p - g) / g).mean(),
        "log10": np.abs(np.log10(p) - np.log10(g)).mean(),
    }
    found |= {f"delta_{t:g}": (ratio < t).mean() for t in DELTAS}
    return {name: float(value) for name, value in found.items()}


def log1p_mse(prediction: Any, depth: Any) -> Tensor:
    """Mean squared error of log(1 + depth) over valid pixels."""
    p, g = _valid(prediction, depth)
    return ((p.log1p() - g.log1p()) ** 2).mean()


def scale_invariant_log(prediction: Any, depth: Any, weight: float = 0.5) -> Tensor:
    """mean(d^2) - weight * mean(d)^2 of d = log p - log g (arXiv 1406.2283).

    Args:
        prediction: above 0 at valid pixels.
        depth: 0 is invalid.
        weight: default 0.5; 0 gives the squared error of logarithms, 1 the variance.
    """
    p, g = _valid(prediction, depth)
    d = p.log() - g.log()
    return (d**2).mean() - weight * d.mean() ** 2


def dinov2_depth_loss(prediction: Any, depth: Any, eps: float = 1e-3) -> Tensor:
    """The root of var(d) + 0.15 mean(d)^2, d = log(p + eps) - log(g + eps) (arXiv 2304.07193).

    The variance divides by N - 1.
    """
    p, g = _valid(prediction, depth)
    d = (p + eps).log() - (g + eps).log()
    return (d.var() + 0.15 * d.mean() ** 2).sqrt()


def _valid(prediction: Any, depth: Any) -> tuple[Tensor, Tensor]:
    """Predictions and depths of the valid pixels."""
    p, g = torch.as_tensor(prediction), torch.as_tensor(depth)
    if p.shape != g.shape:
        raise ValueError(f"prediction has the shape {tuple(p.shape)}, depth {tuple(g.shape)}")
    valid = g > 0
    if not valid.any():
        raise ValueError("depth has no valid pixel: all are 0 or negative")
    return p[valid], g[valid]
