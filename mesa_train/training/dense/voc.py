"""Data sets in PASCAL VOC's format: one XML file a picture, and lists of the splits.

`ImageSets/Main/SPLIT.txt` names the pictures, `JPEGImages` holds them, `Annotations` their objects.
Difficult objects are no targets. VOC counts pixels from 1, and the last pixel belongs to a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .annotations import DetectionSet, Picture, check_pictures, objects_of, refuse, tell_left_out

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def load(folder: str | Path, split: str, *, classes: Sequence[str] | None = None) -> DetectionSet:
    """Read and check a split.

    Args:
        folder: holds `JPEGImages`, `Annotations` and `ImageSets`.
        split: name of a file in `ImageSets/Main`, without its ending.
        classes: names by label; default: the names in the split, sorted. An evaluation takes those
            of the training's split.
    Raises:
        ConfigError: in one line, the file, the field and its value.
    """
    folder = Path(folder)
    stems = stems_of(folder / "ImageSets/Main" / f"{split}.txt")
    trees = [_tree(folder / "Annotations" / f"{stem}.xml") for stem in stems]
    if classes is None:
        found = {name for tree in trees for name in _names(tree)}
        if not found:
            refuse(folder / "Annotations", f"the split {split}", "has no objects")
        classes = sorted(found)
    labels = {name: label for label, name in enumerate(classes)}
    entries, pictures, left_out = [], [], list[str]()
    for stem, (file, root) in zip(stems, trees, strict=True):
        path = picture_path(folder / "JPEGImages", stem, root.findtext("filename"))
        entries.append(("filename", str(path)))
        height, width = (_number(file, root, f"size/{side}") for side in ("height", "width"))
        if min(height, width) < 1:
            refuse(file, "size", f"must be positive, got {height:g} x {width:g}")
        rows = [
            _object(file, f"object[{index}]", element, labels)
            for index, element in enumerate(root.iter("object"))
        ]
        objects = objects_of(rows, int(height), int(width))
        if (~objects.trained & ~objects.ignored).any():
            left_out.append(str(file))
        pictures.append(Picture(str(path), str(file), stem, objects))
    tell_left_out(folder, left_out)
    check_pictures(folder / "Annotations", entries)
    ids = tuple(range(1, len(classes) + 1))
    return DetectionSet(str(folder / "Annotations"), pictures, tuple(classes), ids)


def stems_of(file: Path) -> list[str]:
    """The pictures' names in a list of a split."""
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        refuse(file, "the list", f"cannot be read: {error.strerror}")
    stems = [line.split()[0] for line in lines if line.strip()]
    if not stems:
        refuse(file, "the list", "is empty")
    return stems


def picture_path(folder: Path, stem: str, name: str | None = None) -> Path:
    """The path of a picture: that of `name` or `stem` with one of the usual endings."""
    tried = ([folder / name] if name else []) + [folder / f"{stem}{end}" for end in EXTENSIONS]
    return next((path for path in tried if path.is_file()), tried[0])


def _tree(file: Path) -> tuple[Path, Any]:
    try:
        return file, ElementTree.parse(file).getroot()
    except OSError as error:
        refuse(file, "the file", f"cannot be read: {error.strerror}")
    except ElementTree.ParseError as error:
        refuse(file, "the file", f"is not XML: {error}")


def _names(tree: tuple[Path, Any]) -> list[str]:
    file, root = tree
    found = []
    for index, element in enumerate(root.iter("object")):
        name = (element.findtext("name") or "").strip()
        if not name:
            refuse(file, f"object[{index}]/name", "is missing")
        found.append(name)
    return found


def _object(
    file: Path, field: str, element: Any, labels: dict[str, int]
) -> tuple[list[float], int, bool, float]:
    """The row of `objects_of` of an object."""
    name = (element.findtext("name") or "").strip()
    if name not in labels:
        refuse(file, f"{field}/name", f"must be one of {', '.join(labels)}, got {name!r}")
    corners = [
        _number(file, element, f"bndbox/{corner}", field)
        for corner in ("xmin", "ymin", "xmax", "ymax")
    ]
    x1, y1, x2, y2 = corners[0] - 1, corners[1] - 1, corners[2], corners[3]
    if x2 < x1 or y2 < y1:
        refuse(file, f"{field}/bndbox", f"must have xmin <= xmax and ymin <= ymax, got {corners}")
    ignored = (element.findtext("difficult") or "0").strip() == "1"
    return [x1, y1, x2, y2], labels[name], ignored, (x2 - x1) * (y2 - y1)


def _number(file: Path, element: Any, name: str, field: str = "") -> float:
    text = element.findtext(name)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        path = f"{field}/{name}" if field else name
        refuse(file, path, f"must be a number, got {'nothing' if text is None else repr(text)}")
    return value
