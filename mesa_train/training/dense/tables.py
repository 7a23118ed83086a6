"""Data sets of Hugging Face's `datasets`: pictures in a column, with objects or maps beside them.

A detector's table has the columns `image` and `objects`, as COCO's data sets have there: for each
picture lists of `bbox` and `category`, and optionally `area`, `iscrowd` and `segmentation`.
A segmenter's table has the columns `image` and `annotation`, a map of class numbers.

A picture stays encoded in the table until it is read. Columns `width` and `height` are used if the
table has them; otherwise each picture's header is read once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mesa_train.training.config_schema import ConfigError

from . import coco
from .annotations import (
    Cell,
    DetectionSet,
    Objects,
    Picture,
    objects_of,
    refuse,
    tell_areas,
    tell_left_out,
)
from .maps import MapSet, names_of

# Other names of a field of an object that are in use.
_ALIASES = {
    "category": ("category", "categories", "category_id", "label", "labels"),
    "bbox": ("bbox", "bboxes", "boxes", "box"),
    "iscrowd": ("iscrowd", "is_crowd"),
}


def detection(
    path: str,
    split: str,
    *,
    image_key: str = "image",
    objects_key: str = "objects",
    boxes: str = "xywh",
    masks: bool = False,
    classes: Sequence[str] | None = None,
) -> DetectionSet:
    """Read and check a split of a detector's data set.

    Args:
        path: a folder that `save_to_disk` wrote, a folder that `load_dataset` reads, or a name on a
            hub.
        split: its name.
        image_key, objects_key: columns of the pictures and of their objects.
        boxes: "xywh" (default, as COCO) or "xyxy".
        masks: the segmentations are needed; default false.
        classes: names by label, for categories that the table does not name; default: the values in
            the split, sorted. An evaluation takes those of the training's split.
    Raises:
        ConfigError: in one line, the row, the field and its value.
    """
    rows = _opened(path, split)
    _check_columns(path, rows, image=image_key, objects=objects_key)
    images, plain = rows.select_columns([image_key]), rows.remove_columns(_pictures(rows))
    entries = [_entries(f"{path} {split}[{i}]", row[objects_key]) for i, row in enumerate(plain)]
    named = _class_names(rows.features[objects_key])
    if named is None:
        found = {str(entry["category"]) for own in entries for entry in own}
        named = tuple(classes) if classes is not None else tuple(sorted(found, key=_natural))
        values: Sequence[str] = named
    else:
        values = [str(label) for label in range(len(named))]
    if not named:
        refuse(f"{path} {split}", objects_key, "has no object")
    labels = {value: label for label, value in enumerate(values)}
    pictures, left_out, flat = [], list[str](), list[str]()
    for index, row in enumerate(plain):
        name = f"{path} {split}[{index}]"
        cell = Cell(images, index, image_key, name)
        size = _size(cell, row)
        objects = _objects(name, entries[index], size, labels, boxes, masks)
        if (~objects.trained & ~objects.ignored).any():
            left_out.append(name)
        given = [entry.get("area") for entry in entries[index]]
        if any(a is not None and a <= 0 < b for a, b in zip(given, objects.areas, strict=True)):
            flat.append(name)
        pictures.append(Picture(cell, name, index, objects))
    tell_left_out(f"{path} {split}", left_out)
    tell_areas(f"{path} {split}", flat)
    return DetectionSet(f"{path} {split}", pictures, named, tuple(range(len(named))))


def _objects(
    name: str,
    entries: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    labels: Mapping[str, int],
    boxes: str,
    masks: bool,
) -> Objects:
    """The objects of a row, checked as COCO's annotations."""
    image = {"height": size[0], "width": size[1]}
    coco.check_size(name, "the picture", *size)
    ids = {label: (label, value) for value, label in labels.items()}
    rows, shapes = [], []
    for number, entry in enumerate(entries):
        field, category = f"objects[{number}]", str(entry["category"])
        if category not in labels:
            some = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
            refuse(name, f"{field}.category", f"must be one of {some}, got {category}")
        box = entry.get("bbox")
        own = {**entry, "image_id": 0, "category_id": labels[category]}
        own["bbox"] = _to_xywh(box) if boxes == "xyxy" else box
        rows.append(coco.annotation(name, field, own, {0: image}, ids)[1])
        if masks:
            shapes.append(coco.segmentation(name, field, own, image))
    return objects_of(rows, *size, shapes if masks else None)


def segmentation(
    path: str,
    split: str,
    *,
    image_key: str = "image",
    map_key: str = "annotation",
    zero_ignored: bool = True,
) -> MapSet:
    """Open a split of a segmenter's data set.

    Args:
        path, split, image_key: as for `detection`.
        map_key: column of the maps.
        zero_ignored: see `MapSet`; default true.
    Raises:
        ConfigError: in one line, a missing split or column.
    """
    rows = _opened(path, split)
    _check_columns(path, rows, image=image_key, map=map_key)
    if map_key not in _pictures(rows):
        raise ConfigError(f"data.map_key={map_key}: the column of {path} holds no pictures")
    columns: list[list[Cell]] = []
    for key in (image_key, map_key):
        own = rows.select_columns([key])
        columns.append([Cell(own, i, key, f"{path} {split}[{i}].{key}") for i in range(len(rows))])
    pairs: list[tuple[Any, Any]] = list(zip(*columns, strict=True))
    return MapSet(f"{path} {split}", pairs, names_of(Path(path)), zero_ignored)


def _opened(path: str, split: str) -> Any:
    """A split whose pictures stay encoded."""
    import datasets

    folder = Path(path)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            found: Any = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path)
    except Exception as error:  # from datasets, pyarrow, fsspec, the hub's client or the network
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise ConfigError(f"data.path={path}: {' '.join(f'{error}{cause}'.split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"data.path={path} holds one split without a name; save a DatasetDict with "
            "the splits of training and validation"
        )
    if split not in found:
        raise ConfigError(f"data: {path} has no split {split!r}; it has {', '.join(found)}")
    rows = found[split]
    if not len(rows):
        raise ConfigError(f"data: the split {split!r} of {path} has no rows")
    # A format that was saved with the data would give arrays.
    rows = rows.with_format(None)
    for name in _pictures(rows):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _pictures(rows: Any) -> list[str]:
    """The columns with pictures."""
    import datasets

    return [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]


def _check_columns(path: str, rows: Any, **columns: str) -> None:
    for field, name in columns.items():
        if name not in rows.features:
            have = ", ".join(rows.features)
            raise ConfigError(f"data.{field}_key: {path} has no column {name!r}; it has {have}")
    if columns["image"] not in _pictures(rows):
        raise ConfigError(f"data.image_key={columns['image']}: the column holds no pictures")


def _entries(name: str, value: Any) -> list[dict[str, Any]]:
    """The objects of a row with COCO's names: of a list of objects, or of an object of lists."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        lengths = {key: len(entries) for key, entries in value.items() if entries is not None}
        if len(set(lengths.values())) > 1:
            refuse(name, "objects", f"has lists of different lengths: {lengths}")
        count = next(iter(lengths.values()), 0)
        value = [{key: value[key][i] for key in lengths} for i in range(count)]
    found = []
    for number, entry in enumerate(value):
        own = {key: item for key, item in entry.items() if item is not None}
        for wanted, names in _ALIASES.items():
            first = next((name for name in names if name in own), None)
            if first is not None:
                own[wanted] = own[first]
        if "category" not in own:
            refuse(name, f"objects[{number}]", f"has no category; it has {', '.join(own)}")
        found.append(own)
    return found


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the categories of an objects column; None if the table has no names."""
    import datasets

    for inner in _leaves(feature):
        if isinstance(inner, datasets.ClassLabel):
            return tuple(inner.names)
    return None


def _leaves(feature: Any) -> Iterator[Any]:
    """The features of a category, in objects of lists and lists of objects."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    if isinstance(feature, Mapping):
        for name in _ALIASES["category"]:
            if name in feature:
                yield from _leaves(feature[name])
    else:
        yield feature


def _natural(text: str) -> tuple[int, int, str]:
    """Order of categories: numbers by value, before names."""
    return (0, int(text), "") if text.lstrip("-").isdigit() else (1, 0, text)


def _to_xywh(box: Any) -> Any:
    """A box of two corners as COCO's; another value as it is, for the check."""
    if not isinstance(box, list) or len(box) != 4 or any(x is None for x in box):
        return box
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _size(cell: Cell, row: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a picture, by its columns or its header."""
    sides = [row.get(side) for side in ("height", "width")]
    if all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]  # type: ignore[return-value]
    encoded: Any = cell.read()
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                width, height = height, width
    except Exception as error:  # Pillow raises errors of many types
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{cell} cannot be decoded ({text})") from None
    return height, width
