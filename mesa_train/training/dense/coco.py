"""Data sets in COCO's format: a JSON file of images, annotations and categories.

Category ids may have gaps; labels count from 0 in the order of the ids. Crowd regions, objects
without area and pictures without objects are kept for the evaluation. They are no targets.

pycocotools crashes or overflows on far polygons and on huge pictures, so these are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .annotations import (
    DetectionSet,
    Files,
    Picture,
    check_pictures,
    numbers,
    objects_of,
    refuse,
    tell_areas,
    tell_left_out,
)
from .run_lengths import lengths

# Largest coordinate of a box or a polygon, and most pixels of a picture.
_FAR, _PIXELS = 100_000, 2**31 - 1


def load(file: str | Path, folder: str | Path, *, masks: bool = False) -> DetectionSet:
    """Read and check a file of annotations.

    Args:
        file: the JSON file.
        folder: of the pictures.
        masks: the segmentations are needed; default false.
    Raises:
        ConfigError: in one line, the file, the field and its value.
    """
    file = Path(file)
    values = _read(file)
    categories = _categories(file, values["categories"])
    images = _images(file, values["images"], Path(folder))
    rows: dict[Any, list[Any]] = {key: [] for key in images}
    shapes: dict[Any, list[Any]] = {key: [] for key in images}
    flat = list[str]()
    for index, entry in enumerate(values["annotations"]):
        field = f"annotations[{index}]"
        key, row = annotation(file, field, entry, images, categories)
        if has_flat_area(entry, row):
            flat.append(field)
        rows[key].append((field, row))
        if masks:
            shapes[key].append(segmentation(file, field, entry, images[key]))
    pictures, left_out = [], list[str]()
    for key, image in images.items():
        own = [row for _, row in rows[key]]
        objects = objects_of(own, image["height"], image["width"], shapes[key] if masks else None)
        lost = ~objects.trained & ~objects.ignored
        left_out += [field for (field, _), gone in zip(rows[key], lost, strict=True) if gone]
        pictures.append(Picture(image["path"], f"{file} {image['field']}", key, objects))
    tell_left_out(file, left_out)
    tell_areas(file, flat)
    check_pictures(file, ((f"{i['field']}.file_name", i["path"]) for i in images.values()))
    names = tuple(name for _, name in categories.values())
    return DetectionSet(str(file), pictures, names, tuple(categories))


def _read(file: Path) -> dict[str, Any]:
    """The JSON object with its three lists."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        refuse(file, "the file", f"cannot be read: {error.strerror}")
    except ValueError as error:
        refuse(file, "the file", f"is not JSON: {error}")
    if not isinstance(values, dict):
        refuse(file, "the file", f"must hold an object, got {type(values).__name__}")
    for field in ("images", "annotations", "categories"):
        found = values.get(field)
        if not isinstance(found, list):
            refuse(file, field, f"must be a list, got {_shown(found)}")
        for index, entry in enumerate(found):
            if not isinstance(entry, dict):
                refuse(file, f"{field}[{index}]", f"must be an object, got {_shown(entry)}")
    if not values["images"]:
        refuse(file, "images", "is empty")
    return values


def _categories(file: str | Path, entries: list[Any]) -> dict[int, tuple[int, str]]:
    """(label, name) by category id."""
    found: dict[int, str] = {}
    for index, entry in enumerate(entries):
        field, key = f"categories[{index}]", entry.get("id")
        if not _whole(key):
            refuse(file, f"{field}.id", f"must be an integer, got {_shown(key)}")
        if key in found:
            refuse(file, f"{field}.id", f"is {key}, as of another category")
        if not isinstance(entry.get("name"), str):
            refuse(file, f"{field}.name", f"must be text, got {_shown(entry.get('name'))}")
        found[key] = entry["name"]
    if not found:
        refuse(file, "categories", "is empty")
    return {key: (label, found[key]) for label, key in enumerate(sorted(found))}


def _images(file: str | Path, entries: list[Any], folder: Path) -> dict[Any, dict[str, Any]]:
    """Path, field, height and width of each image, by its id."""
    found: dict[Any, dict[str, Any]] = {}
    kind: type | None = None
    files = Files()
    for index, entry in enumerate(entries):
        field, key = f"images[{index}]", entry.get("id")
        if not (_whole(key) or isinstance(key, str)) or kind not in (None, type(key)):
            refuse(file, f"{field}.id", f"must be an integer as all others, got {_shown(key)}")
        kind = type(key)
        if key in found:
            refuse(file, f"{field}.id", f"is {key!r}, as of {found[key]['field']}")
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            refuse(file, f"{field}.file_name", f"must be text, got {_shown(name)}")
        for side in ("height", "width"):
            value = entry.get(side)
            if not _whole(value) or value < 1:
                refuse(file, f"{field}.{side}", f"must be a positive integer, got {_shown(value)}")
        sides = {side: entry[side] for side in ("height", "width")}
        check_size(file, field, **sides)
        found[key] = {"field": field, "path": _path(folder, name, files), **sides}
    return found


def check_size(file: str | Path, field: str, height: int, width: int) -> None:
    """ConfigError for a picture with more pixels than pycocotools can count."""
    if max(height, width) > _FAR or height * width > _PIXELS:
        refuse(file, field, f"says {height} x {width} pixels, more than a picture can have")


def _path(folder: Path, name: str, files: Files) -> str:
    """The path of a picture. Windows' backslashes are slashes if the file exists so."""
    path, other = str(folder / name), str(folder / name.replace("\\", "/"))
    return other if path != other and path not in files and other in files else path


def annotation(
    file: str | Path,
    field: str,
    entry: Mapping[str, Any],
    images: Mapping[Any, Any],
    categories: Mapping[int, tuple[int, str]],
) -> tuple[Any, tuple[list[float], int, bool, float]]:
    """(image id, row of `objects_of`) of an annotation."""
    key, category = entry.get("image_id"), entry.get("category_id")
    if isinstance(key, list | dict) or key not in images:
        refuse(file, f"{field}.image_id", f"is the id of no image, got {_shown(key)}")
    if not isinstance(category, int) or not _whole(category) or category not in categories:
        ids = ", ".join(map(str, list(categories)[:8])) + (", ..." if len(categories) > 8 else "")
        refuse(file, f"{field}.category_id", f"must be one of {ids}, got {_shown(category)}")
    box = numbers(entry.get("bbox"), 4)
    if box is None or min(box[2:]) < 0:
        shown = _shown(entry.get("bbox"))
        refuse(file, f"{field}.bbox", f"must be [x, y, width, height], got {shown}")
    if _is_far(box):
        shown = _shown(entry.get("bbox"))
        refuse(file, f"{field}.bbox", f"must be within {_FAR} pixels, got {shown}")
    # null is a missing value.
    crowd, area = entry.get("iscrowd"), entry.get("area")
    if crowd not in (None, 0, 1):
        refuse(file, f"{field}.iscrowd", f"must be 0 or 1, got {_shown(crowd)}")
    if area is not None and numbers([area], 1) is None:
        refuse(file, f"{field}.area", f"must be a number, got {_shown(area)}")
    x, y, width, height = box
    if area is None or area <= 0:
        area = width * height
    return key, ([x, y, x + width, y + height], categories[category][0], bool(crowd), float(area))


def has_flat_area(entry: Mapping[str, Any], row: tuple[list[float], int, bool, float]) -> bool:
    """True if the area of a box replaced an area of 0 or less of its annotation."""
    area = entry.get("area")
    return area is not None and area <= 0 < row[3]


def _is_far(coordinates: list[float]) -> bool:
    return max(map(abs, coordinates), default=0) > _FAR


def segmentation(
    file: str | Path, field: str, entry: Mapping[str, Any], image: Mapping[str, Any]
) -> Any:
    """Polygons of at least three points, or run lengths; an empty list if no polygon is left."""
    field, value = f"{field}.segmentation", entry.get("segmentation")
    if isinstance(value, list):
        for polygon in value:
            points = numbers(polygon, len(polygon)) if isinstance(polygon, list) else None
            if points is None:
                refuse(file, field, f"must have polygons of numbers, got {_shown(polygon)}")
            if _is_far(points):
                shown = _shown(polygon)
                refuse(file, field, f"must have polygons within {_FAR} pixels, got {shown}")
            if len(polygon) % 2:
                refuse(file, field, f"has a polygon of {len(polygon)} numbers, which must be even")
        return [polygon for polygon in value if len(polygon) >= 6]
    if not isinstance(value, dict):
        refuse(file, field, f"must be polygons or run lengths, got {_shown(value)}")
    size = [image["height"], image["width"]]
    if value.get("size") != size:
        refuse(file, f"{field}.size", f"must be {size}, got {_shown(value.get('size'))}")
    counts = value.get("counts")
    if isinstance(counts, list):
        if not all(_whole(count) and count >= 0 for count in counts):
            refuse(file, f"{field}.counts", "must be integers from 0 on")
        runs: list[int] = counts
    elif isinstance(counts, str):
        found = lengths(counts)
        if found is None:
            refuse(file, f"{field}.counts", f"is damaged: {_shown(counts)}")
        runs = found
    else:
        refuse(file, f"{field}.counts", f"must be a list or text, got {_shown(counts)}")
    if sum(runs) != size[0] * size[1]:
        pixels = size[0] * size[1]
        refuse(file, f"{field}.counts", f"cover {sum(runs)} of {pixels} pixels")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in at most 60 characters."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
