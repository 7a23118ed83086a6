"""Reader of an image folder with one folder for each class: PATH/SPLIT/CLASS/**/*.jpg.

The imagefolder reader of `datasets` guesses splits from words in paths. A class named `train` or
`dev` therefore moves images between training and validation. This reader takes exactly
PATH/train_split and PATH/val_split. It takes every path literally: brackets and stars are no
patterns.

- The classes are the folders in the training split, sorted by name as in torchvision's ImageFolder.
  The validation images get the numbers of the training classes.
- A folder inside a class belongs to that class. Symbolic links are followed, each folder once.
- Names that begin with a dot are skipped. Files without the suffix of an image format that this
  Pillow reads (upper or lower case) are skipped too, such as metadata.csv: labels come from
  folders.
- A name that is not UTF-8 is kept (surrogateescape) and printed with backslashes.

An oddity that does not stop training gives one warning for each split. Any other is a ConfigError.
Listing reads names only, no file: about 1 s for 100,000 images on a local disk.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mesa_train.training.config_schema import ConfigError

_log = logging.getLogger(__name__)
# Pillow registers these formats but has no reader for them.
_STUBS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
_SHOWN = 3


@dataclass
class Listing:
    """The images of one split by class, and the names that were skipped.

    Attributes:
        folder: of the split.
        classes: paths of the images, by class.
        no_images: files that are no images.
        outside: images outside the class folders.
        hidden: images whose name begins with a dot.
        nested: folders inside class folders; their images are not skipped.
        unreadable: folders that cannot be read.
        twice: links to a folder that is listed already.
    """

    folder: str
    classes: dict[str, list[str]]
    no_images: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


class Rows:
    """The (path, label) pairs of a split, by index or as a shuffled stream of `datasets`' rows."""

    def __init__(self, paths: list[str], labels: list[int], order: list[int] | None = None) -> None:
        self.paths, self.labels = paths, labels
        self.order = order

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)) if self.order is None else self.order:
            yield {
                "image": {"path": self.paths[index], "bytes": None},
                "label": self.labels[index],
            }

    def shuffle(self, seed: int, buffer_size: int = 0) -> Rows:
        """The same rows in an order that depends on the seed. The buffer is the whole split."""
        del buffer_size
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return Rows(self.paths, self.labels, order)


def load(
    train_folder: str,
    val_folder: str,
    fields: tuple[str, str] = ("data.train_split", "data.val_split"),
) -> tuple[Rows, Rows, list[str]]:
    """List the images of both splits.

    Args:
        train_folder: folder of the training split.
        val_folder: folder of the validation split.
        fields: the settings that name the folders, for error messages.
    Returns:
        (training rows, validation rows, names of the classes).
    Raises:
        ConfigError: a folder is missing, or holds no image or no class folder. Training has one
            class only, or a class without images. Validation has a class that training lacks.
    """
    train, val = _listed(train_folder, fields[0]), _listed(val_folder, fields[1])
    _check_train(train, fields[0])
    extra = [name for name in val.classes if name not in train.classes and val.classes[name]]
    if extra:
        raise ConfigError(
            f"{fields[1]}: {shown(val.folder)} has classes that {shown(train.folder)} has not: "
            f"{_some(extra)}"
        )
    lacking = [name for name in train.classes if not val.classes.get(name)]
    if lacking:
        _log.warning("%s has no image of the classes %s", shown(val.folder), _some(lacking))
    for listing in (train, val):
        _report(listing)
    names = sorted(train.classes)
    return _rows(train, names), _rows(val, names), names


def load_one(folder: str, field: str) -> tuple[Rows, list[str]]:
    """List the images of a single folder with one folder for each class.

    Returns:
        (rows, names of the classes).
    Raises:
        ConfigError: the folder is missing, or holds no image or no class folder.
    """
    listing = _listed(folder, field)
    _report(listing)
    names = sorted(listing.classes)
    return _rows(listing, names), names


def load_flat(folder: str, field: str) -> Rows:
    """List all images of a folder and its subfolders, sorted by path; every label is 0.

    Raises:
        ConfigError: the folder is missing or holds no image.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{field}: no such folder {shown(folder)}")
    found, paths = Listing(folder, {}), list[str]()
    _walk(folder, ".", paths, found)
    if not paths:
        raise ConfigError(f"{field}: no image in {shown(folder)} or its subfolders")
    found.nested.clear()  # there are no classes
    _report(found)
    return Rows(sorted(paths), [0] * len(paths))


def shown(path: str) -> str:
    """Format a path for a message.

    Bytes that are not UTF-8, and control characters, get backslashes.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _rows(listing: Listing, names: list[str]) -> Rows:
    """The rows of a split, sorted by class and path."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = sorted(listing.classes.get(name, []))
        paths += own
        labels += [label] * len(own)
    return Rows(paths, labels)


def _check_train(train: Listing, field: str) -> None:
    """Raise ConfigError if the training split has an empty class or a single class."""
    folder = shown(train.folder)
    empty = [name for name, paths in train.classes.items() if not paths]
    if empty:
        why = f"; cannot be read: {_some(train.unreadable)}" if train.unreadable else ""
        raise ConfigError(f"{field}: no image in {folder} of the classes {_some(empty)}{why}")
    if len(train.classes) == 1:
        (name,) = train.classes
        nested = f"; it holds the folders {_some(train.nested)}" if train.nested else ""
        raise ConfigError(
            f"{field}: {folder} has one class folder, {shown(name)!r}, and training needs two{nested}"
        )


def _listed(folder: str, field: str) -> Listing:
    """List the images of one split. ConfigError if there are none."""
    if not Path(folder).is_dir():
        if not field.endswith("_split"):
            raise ConfigError(f"{field}: no such folder {shown(folder)}")
        path, split = os.path.split(folder)
        if not Path(path or ".").is_dir():
            unknown = "; ~ is taken as it stands" if path.startswith("~") else ""
            raise ConfigError(f"data.path: no such folder {shown(path)}{unknown}")
        raise ConfigError(
            f"{field}: imagefolder has no split {shown(split)!r}; it has {_found(path)} in "
            f"{shown(path)}"
        )
    found = Listing(folder, {})
    for entry in _entries(folder, found):
        kind = _kind(entry)
        if kind == "folder":
            found.classes[entry.name] = []
        elif kind == "image":
            found.outside.append(entry.name)
        else:
            found.no_images.append(entry.name)
    if not found.classes:
        why = f", but {len(found.outside)} images" if found.outside else ""
        why += f"; cannot be read: {_some(found.unreadable)}" if found.unreadable else ""
        raise ConfigError(f"{field}: {shown(folder)} has no class folders{why}")
    for name, paths in found.classes.items():
        _walk(f"{folder}/{name}", name, paths, found)
    if not any(found.classes.values()):
        raise ConfigError(f"{field}: no image in the class folders of {shown(folder)}")
    return found


def _walk(top: str, name: str, paths: list[str], found: Listing) -> None:
    """Append the images of a class folder and its subfolders. Each folder is read once."""
    seen: set[tuple[int, int]] = set()
    waiting = [(top, name)]
    while waiting:
        folder, relative = waiting.pop()
        try:
            status = Path(folder).stat()
        except OSError as error:
            found.unreadable.append(f"{relative} ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in seen:
            found.twice.append(relative)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(folder, found):
            place = f"{relative}/{entry.name}"
            kind = _kind(entry)
            if kind == "folder":
                found.nested.append(place)
                waiting.append((entry.path, place))
            elif kind == "image":
                paths.append(entry.path)
            else:
                found.no_images.append(place)


def _entries(folder: str, found: Listing) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        found.unreadable.append(f"{os.path.relpath(folder, found.folder)} ({error.strerror})")
        return []
    found.hidden += [e.name for e in listed if e.name.startswith(".") and _is_image(e.name)]
    return [entry for entry in listed if not entry.name.startswith(".")]


def _report(listing: Listing) -> None:
    """Log one warning about the skipped names of a split and about folders inside classes."""
    parts = []
    for names, one, what in (
        (listing.no_images, "file that is no image", "files that are no images"),
        (listing.outside, "image outside the classes", "images outside the classes"),
        (listing.hidden, "hidden image", "hidden images"),
        (listing.twice, "second link to a folder", "further links to folders"),
        (listing.unreadable, "folder that cannot be read", "folders that cannot be read"),
    ):
        if names:
            parts.append(
                f"passed over {len(names)} {what if len(names) > 1 else one} ({_some(names)})"
            )
    if listing.nested:
        parts.append(
            f"images of folders within a class count as that class ({_some(listing.nested)})"
        )
    if parts:
        _log.warning("%s: %s", shown(listing.folder), "; ".join(parts))


def _found(path: str) -> str:
    """The names in a folder, for an error message."""
    try:
        names = sorted(entry.name for entry in Path(path).iterdir())
    except OSError:
        return "nothing"
    return _some([name for name in names if not name.startswith(".")]) or "nothing"


def _some(names: list[str]) -> str:
    """A few names, and the number of further names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more


def _kind(entry: os.DirEntry[str]) -> str:
    """Classify an entry: "folder", "image" or "other".

    The suffix classifies a broken link, so that reading the image fails with its path. A pipe or a
    device is "other", because reading it may block forever.
    """
    try:
        if entry.is_dir():
            return "folder"
        readable = entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:  # a link to itself
        readable = entry.is_symlink()
    return "image" if readable and _is_image(entry.name) else "other"


def _is_image(name: str) -> bool:
    """True if a name has the suffix of an image format that Pillow reads."""
    return Path(name).suffix.lower() in _endings()


@cache
def _endings() -> frozenset[str]:
    """The suffixes of the formats that this Pillow reads."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(e for e, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)
