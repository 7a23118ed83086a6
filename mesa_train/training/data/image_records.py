"""The records that every source of images gives: encoded images by key, with label and path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class CorruptImage(RuntimeError):
    """An image that cannot be decoded; the message names its path."""


@dataclass(frozen=True)
class Records:
    """Encoded or decoded images: `read(key)` gives (bytes, path, array or None; label; path).

    A key is an index below `count`, or, where there is a `stream`, one of the rows it yields.
    """

    read: Callable[[Any], tuple[Any, int, str]]
    count: int
    stream: Any = None


@dataclass(frozen=True)
class Sources:
    """Training and validation records of one data set."""

    train: Records
    val: Records
    classes: int
