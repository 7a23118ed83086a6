"""Inputs of the metrics: NumPy arrays or tensors, checked and in float64.

A metric is a number for a report, and its cost is small next to that of the features. Therefore all
metrics compute in float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def to_numpy(values: Any) -> Array:
    """An array of a tensor on any device, of an array or of a list. Floats become float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def numbers(name: str, values: Any, dims: int) -> Array:
    """A finite float64 array with `dims` dimensions and at least one element.

    Raises:
        ValueError: names the argument and what is wrong with it.
    """
    array = to_numpy(values)
    if array.ndim != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got the shape {array.shape}")
    if not array.size:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold numbers, got the dtype {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def indices(name: str, values: Any, length: int, below: int | None = None) -> Array:
    """An int64 array (length,) of indices from 0.

    Args:
        name: of the argument, for messages.
        values: whole numbers.
        length: how many there must be.
        below: all indices must be smaller; default: no bound.
    Raises:
        ValueError: names the argument and what is wrong with it.
    """
    array = to_numpy(values)
    if array.shape != (length,):
        raise ValueError(f"{name} must have the shape ({length},), got {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, got the dtype {array.dtype}")
    array = array.astype(np.int64)
    if length and (array.min() < 0 or (below is not None and array.max() >= below)):
        bound = "" if below is None else f" and {below - 1}"
        raise ValueError(
            f"{name} must lie between 0{bound}, got {int(array.min())} to {int(array.max())}"
        )
    return array


def flags(name: str, values: Any, length: int | None = None) -> Array:
    """A boolean array (length,) of booleans, or of the numbers 0 and 1.

    Raises:
        ValueError: names the argument and what is wrong with it.
    """
    array = to_numpy(values)
    if array.ndim != 1 or not array.size or (length is not None and len(array) != length):
        wanted = "(N,)" if length is None else f"({length},)"
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1")
    return array.astype(bool)


def probability_rows(name: str, values: Any) -> Array:
    """Probabilities (N, classes) in [0, 1]. Rows need not sum to 1: a sigmoid's do not.

    Raises:
        ValueError: names the argument and what is wrong with it.
    """
    array = numbers(name, values, 2)
    if array.min() < -1e-9 or array.max() > 1 + 1e-6:
        raise ValueError(
            f"{name} must lie in [0, 1], got {array.min():g} to {array.max():g}; "
            "logits need a softmax first"
        )
    return array.clip(0.0, 1.0)


def softmax(logits: Any) -> Array:
    """Probabilities (N, classes) of logits, in float64. Logits of -inf get 0.

    Raises:
        ValueError: a row has no finite logit, or a logit is nan or +inf.
    """
    from scipy.special import softmax as scipy_softmax

    array = to_numpy(logits).astype(np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"logits must have the shape (N, classes), got {array.shape}")
    if np.isnan(array).any() or not np.isfinite(array.max(1)).all():
        raise ValueError("logits hold values that are not finite")
    return scipy_softmax(array, axis=1)
