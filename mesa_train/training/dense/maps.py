"""Data sets for segmentation: pictures and index maps of classes.

ADE20K's format has `images/SPLIT/**/NAME.jpg` and `annotations/SPLIT/**/NAME.png`. VOC's has
`JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` and `ImageSets/Segmentation/SPLIT.txt`. A map is
a picture of one channel (8 or 16 bits, grey or with a palette) whose pixels are class numbers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mesa_train.training.data.image_records import CorruptImage

from .annotations import encoded, refuse
from .voc import EXTENSIONS, picture_path, stems_of

IGNORED = 255


@dataclass(frozen=True)
class MapSet:
    """A split of a data set.

    Attributes:
        folder: of the maps.
        pairs: (picture, map), each a path or a `Cell` of a table; paths are sorted.
        names: of the classes by label, if the folder names them.
        zero_ignored: value 0 is no class, and value v is class v - 1.
    """

    folder: str
    pairs: list[tuple[Any, Any]]
    names: tuple[str, ...] | None
    zero_ignored: bool


def load(folder: str | Path, split: str, *, voc: bool = False, zero_ignored: bool = True) -> MapSet:
    """Find the pictures and maps of a split.

    Args:
        folder: of the data set. Its file `classes.txt`, a name a line, is optional.
        split: name of a folder in `images` and `annotations`, or of VOC's list.
        voc: VOC's format; default false: ADE20K's.
        zero_ignored: see `MapSet`; default true.
    Raises:
        ConfigError: in one line, a missing folder, picture or map.
    """
    folder = Path(folder)
    if voc:
        stems = stems_of(folder / "ImageSets/Segmentation" / f"{split}.txt")
        images, maps = folder / "JPEGImages", folder / "SegmentationClass"
        pairs = [(picture_path(images, stem), maps / f"{stem}.png") for stem in stems]
    else:
        images, maps = folder / "images" / split, folder / "annotations" / split
        if not images.is_dir():
            refuse(images, "the folder", "of the pictures does not exist")
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            refuse(images, "the folder", "has no pictures")
        pairs = [(p, (maps / p.relative_to(images)).with_suffix(".png")) for p in paths]
    for kind, paths in (("picture", [p for p, _ in pairs]), ("map", [m for _, m in pairs])):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            refuse(
                missing[0], f"the {kind}", f"does not exist; {len(missing)} of {len(paths)} do not"
            )
    return MapSet(str(maps), [(str(p), str(m)) for p, m in pairs], names_of(folder), zero_ignored)


def names_of(folder: Path) -> tuple[str, ...] | None:
    """The classes of a folder's `classes.txt`, a name a line; None if there is no such file."""
    names = folder / "classes.txt"
    lines = names.read_text().splitlines() if names.is_file() else []
    return tuple(line.strip() for line in lines if line.strip()) or None


def read_map(path: Any, classes: int, *, zero_ignored: bool) -> NDArray[np.int64]:
    """The labels (H, W) of a map: from 0 to classes - 1, or 255 for ignored pixels.

    Args:
        path: of the map, or a `Cell`.
        classes: number of classes.
        zero_ignored: value 0 is ignored, and value v is class v - 1.
    Raises:
        CorruptImage: the file is no map, or a value is no class. The message names the value.
    """
    try:
        found = encoded(path)
        with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
            mode, values = image.mode, np.array(image)
    except Exception as error:  # Pillow raises errors of many types
        text = " ".join(str(error).split())
        raise CorruptImage(f"{path} cannot be decoded ({text or type(error).__name__})") from None
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise CorruptImage(
            f"{path} must be a map of class numbers in one channel, got a picture of mode {mode}"
        )
    values = values.astype(np.int64)
    labels = np.where(values == 0, IGNORED, values - 1) if zero_ignored else values
    # The value 255 is ignored in every format.
    labels = np.where(values == IGNORED, IGNORED, labels)
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise CorruptImage(
            f"{path} has the value {values[y, x]} at row {y}, column {x}; {classes} classes have "
            f"the values {int(zero_ignored)} to {classes - 1 + zero_ignored}"
        )
    return labels
