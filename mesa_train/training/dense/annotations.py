"""Pictures with annotated objects, as the readers of COCO's and VOC's formats give them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mesa_train.training.config_schema import ConfigError

from .run_lengths import decode

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one picture.

    Attributes:
        boxes: (N, 4), x1, y1, x2, y2 in pixels, as annotated.
        labels: (N,), from 0.
        ignored: (N,), true for crowd regions and difficult objects. They are no targets, and an
            evaluation does not count detections on them.
        areas: (N,), in pixels.
        trained: (N,), true for targets: not ignored, at least one pixel wide and high.
        segmentations: COCO's polygons or run lengths, or None.
        height, width: of the picture.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    areas: NDArray[np.float64]
    trained: NDArray[np.bool_]
    segmentations: tuple[Any, ...] | None
    height: int
    width: int

    def targets(self) -> NDArray[np.float32]:
        """The boxes of the targets, clipped to the picture."""
        limits = np.array([self.width, self.height] * 2, np.float32)
        return np.clip(self.boxes[self.trained], 0, limits)

    def masks(self) -> NDArray[np.uint8]:
        """The masks (targets, H, W) of the targets."""
        assert self.segmentations is not None
        found = np.zeros((int(self.trained.sum()), self.height, self.width), np.uint8)
        for row, index in enumerate(np.flatnonzero(self.trained)):
            found[row] = decode(self.segmentations[index], self.height, self.width)
        return found


@dataclass(frozen=True, eq=False)
class Cell:
    """An encoded picture in a table of `datasets`.

    Attributes:
        rows: the table; its pictures are not decoded.
        index: of the row.
        column: with the pictures.
        name: for messages.
    """

    rows: Any
    index: int
    column: str
    name: str

    def read(self) -> bytes | str | None:
        """The file's bytes or its path; None if the cell is empty."""
        value = self.rows[self.index][self.column] or {}
        return value.get("bytes") or value.get("path")

    def __str__(self) -> str:
        return self.name


def encoded(picture: Any) -> Any:
    """The bytes or the path of a picture: of a `Cell`, or the path itself."""
    return picture.read() if isinstance(picture, Cell) else picture


@dataclass(frozen=True)
class Picture:
    """One picture of a data set.

    Attributes:
        path: of the file, or a `Cell` of a table.
        name: of the entry that describes it, for messages.
        id: in the annotations.
        objects: its objects.
    """

    path: Any
    name: str
    id: Any
    objects: Objects


@dataclass(frozen=True)
class DetectionSet:
    """A split of a data set.

    Attributes:
        file: the annotations.
        pictures: in the annotations' order.
        names: of the classes, by label.
        category_ids: by label, as in the annotations.
    """

    file: str
    pictures: list[Picture]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def for_training(self, smallest: int) -> DetectionSet:
        """The pictures with a target whose sides have at least `smallest` pixels."""
        chosen = [
            picture
            for picture in self.pictures
            if picture.objects.trained.any()
            and min(picture.objects.height, picture.objects.width) >= smallest
        ]
        if not chosen:
            raise ConfigError(
                f"{self.file}: none of {len(self.pictures)} pictures has a target, a box of at least "
                f"one pixel in a picture of at least {smallest} pixels a side"
            )
        left = len(self.pictures) - len(chosen)
        if left:
            _log.warning("%s: %d pictures without a target are not trained on", self.file, left)
        return DetectionSet(self.file, chosen, self.names, self.category_ids)


def objects_of(
    rows: Sequence[tuple[Sequence[float], int, bool, float]],
    height: int,
    width: int,
    segmentations: Sequence[Any] | None = None,
) -> Objects:
    """Objects of a picture.

    Args:
        rows: (box as x1, y1, x2, y2; label; ignored; area in pixels) of each object.
        height, width: of the picture.
        segmentations: of each object, or None.
    """
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    ignored = np.array([row[2] for row in rows], np.bool_)
    areas = np.array([row[3] for row in rows], np.float64)
    limits = np.array([width, height], np.float32)
    inside = np.clip(boxes[:, 2:], 0, limits) - np.clip(boxes[:, :2], 0, limits)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1) & (inside > 0).all(1) & (areas > 0)
    if segmentations is not None:
        large &= np.array([bool(segmentation) for segmentation in segmentations], np.bool_)
    return Objects(
        boxes=boxes,
        labels=np.array([row[1] for row in rows], np.int64),
        ignored=ignored,
        areas=areas,
        trained=large & ~ignored,
        segmentations=None if segmentations is None else tuple(segmentations),
        height=height,
        width=width,
    )


def refuse(file: str | Path, field: str, text: str) -> NoReturn:
    """Raise ConfigError with one line that names file and field."""
    raise ConfigError(f"{file}: {field} {text}")


def tell_left_out(file: str | Path, names: Sequence[str]) -> None:
    """Log how many objects are no targets because they have no area."""
    if names:
        _log.warning(
            "%s: %d objects without area are not trained on; the first is %s",
            *(file, len(names), names[0]),
        )


def tell_areas(file: str | Path, names: Sequence[str]) -> None:
    """Log how many objects have a box, but no positive `area`."""
    if names:
        _log.warning(
            "%s: %d objects have area 0 or less beside a box, whose area is used; the first is %s",
            *(file, len(names), names[0]),
        )


def numbers(value: Any, count: int) -> list[float] | None:
    """A list of `count` finite numbers; None if the value is another."""
    if not isinstance(value, list) or len(value) != count:
        return None
    right = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    try:
        found = [float(x) for x in value] if right else [math.nan]
    except OverflowError:  # an integer beyond all floats
        return None
    return found if all(math.isfinite(x) for x in found) else None


class Files:
    """Which pictures exist. Each folder is listed once."""

    def __init__(self) -> None:
        self.listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.listed:
            try:
                with os.scandir(folder) as entries:
                    self.listed[folder] = {entry.name for entry in entries}
            except OSError:
                self.listed[folder] = set()
        return name in self.listed[folder]


def check_pictures(file: str | Path, entries: Iterable[tuple[str, str]]) -> None:
    """Check that pictures exist.

    Args:
        file: the annotations.
        entries: (field, path) of each picture.
    Raises:
        ConfigError: names the first missing picture, and how many are missing.
    """
    files, total = Files(), 0
    missing = []
    for field, path in entries:
        total += 1
        if path not in files:
            missing.append((field, path))
    if missing:
        field, path = missing[0]
        refuse(file, field, f"names no picture: {path}; {len(missing)} of {total} are missing")
