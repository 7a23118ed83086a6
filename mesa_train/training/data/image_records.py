"""Records that every image source returns: encoded images by key, with label and path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class CorruptImage(RuntimeError):
    """An image cannot be decoded. The message names its path."""


@dataclass(frozen=True)
class Records:
    """Images of one split, encoded or decoded.

    Attributes:
        read: from a key to (bytes, path, array or None; label; path). A key is an index below
            `count`, or a row of `stream`.
        count: number of images.
        stream: iterable of rows; None if images are read by index.
    """

    read: Callable[[Any], tuple[Any, int, str]]
    count: int
    stream: Any = None


@dataclass(frozen=True)
class Sources:
    """Training and validation records of one data set.

    Attributes:
        train: training records.
        val: validation records.
        classes: number of classes.
    """

    train: Records
    val: Records
    classes: int
