"""Images of an evaluation and their features, which are computed once and kept on disk.

Features are kept in pieces of `PIECE` images. With several processes, each computes every n-th
piece; a run that was interrupted continues with the pieces that lack. The number of processes does
not change the pieces.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import folder, packaged
from mesa_train.training.data.decode import decode
from mesa_train.training.data.sources import keeping_random_state, seed_cpu
from mesa_train.training.evaluation.linear_probe import cached
from mesa_train.training.progress import Every

from .frozen import FrozenModel, to_rgb

PIECE = 1024
# Least share of the area in a mild crop.
MILD = 0.7


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        name: for the cache and the report.
        read: image i as a PIL image in RGB.
        labels: (N,).
        classes: names of the classes.
        squash: the images fill their frame, so the evaluation crops nothing.
        stamp: changes with the files, for the cache.
    """

    name: str
    read: Callable[[int], Any]
    labels: Tensor
    classes: tuple[str, ...]
    squash: bool = False
    stamp: str = ""

    def __len__(self) -> int:
        return len(self.labels)


def of_package(name: str) -> tuple[Images, Images]:
    """Training and held-out images that a package ships: "digits" or "mnist5k"."""
    found = packaged.load(name)
    classes = tuple(str(i) for i in range(found.num_classes))

    def made(split: packaged.Split, which: str) -> Images:
        pixels = split.images.squeeze(1).numpy()
        read = lambda i: to_rgb(pixels[i])  # noqa: E731
        return Images(f"{name}/{which}", read, split.labels, classes, squash=True)

    return made(found.train, "train"), made(found.held_out, "held_out")


def of_folders(train: str, held_out: str) -> tuple[Images, Images]:
    """Training and held-out images of two folders, with one folder for each class.

    Raises:
        ConfigError: a folder is missing or has no classes or images.
    """
    known, test, classes = folder.load(train, held_out, ("--train", "--held-out"))
    return _rows(known, train, classes), _rows(test, held_out, classes)


def of_folder(path: Path, option: str) -> Images:
    """Images of one folder with one folder for each class."""
    rows, classes = folder.load_one(str(path), option)
    return _rows(rows, str(path), classes)


def of_any(path: Path, option: str) -> Images:
    """All images of a folder and of its subfolders. They have no labels: all are 0."""
    rows = folder.load_flat(str(path), option)
    # The same files may be in the cache with labels.
    mark = f"flat {stamp(rows.paths)}"
    return Images(
        str(path), lambda i: image_of(rows.paths[i]), torch.tensor(rows.labels), (), stamp=mark
    )


def of_subset(path: Path, subset: str) -> Images:
    """Images of one of ImageNet's test sets, with the labels of `subset_folders`.

    Folders that the set's list does not have are left out: ObjectNet's 200 other classes.

    Raises:
        ConfigError: the folder has none of the set's classes.
    """
    from mesa_train.training.evaluation.label_subsets import objectnet_crop, subset_folders

    rows, classes = folder.load_one(str(path), "--data")
    places = {name: i for i, name in enumerate(subset_folders(subset))}
    kept = [i for i, label in enumerate(rows.labels) if classes[label] in places]
    if not kept:
        raise ConfigError(
            f"--data: {path} has no class folder of {subset}; its folders are named like "
            f"{', '.join(list(places)[:3])}"
        )
    paths = [rows.paths[i] for i in kept]
    labels = torch.tensor([places[classes[rows.labels[i]]] for i in kept])

    def read(i: int) -> Any:
        image = image_of(paths[i])
        return objectnet_crop(image) if subset == "objectnet" else image

    return Images(str(path), read, labels, tuple(places), stamp=stamp(paths))


def short_side_of(subset: str, size: int) -> int | None:
    """The short side of a set's images before the crop of `size` pixels; None for the square resize."""
    from mesa_train.training.evaluation.label_subsets import resize_rule

    rule, pixels = resize_rule(subset, size)
    return pixels if rule == "short side" else None


def of_validation(path: Path) -> Images:
    """ImageNet's validation images by the numbers in their names; the labels are the numbers.

    Raises:
        ConfigError: a name is no ILSVRC2012_val_########.JPEG, or its number is above 50,000.
    """
    paths = [str(p) for p in sorted(path.rglob("*.JPEG"))]
    names = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(p).stem) for p in paths]
    numbers = [int(name[1]) if name else 0 for name in names]
    if not paths or not all(1 <= number <= 50_000 for number in numbers):
        raise ConfigError(
            f"--data: {path} must hold images ILSVRC2012_val_00000001.JPEG to "
            f"ILSVRC2012_val_00050000.JPEG, got {Path(paths[0]).name if paths else 'none'}"
        )
    labels = torch.tensor(numbers) - 1
    return Images(str(path), lambda i: image_of(paths[i]), labels, (), stamp=stamp(paths))


class FeatureCache:
    """Features of images, from the disk or computed by all processes.

    Args:
        model: the frozen model.
        folder: of the cache.
        accelerator: Accelerate's.
        batch_size: images at a time.
        half: keep float16.
    """

    def __init__(
        self, model: FrozenModel, folder: Path, accelerator: Any, batch_size: int, half: bool
    ) -> None:
        from datasets import disable_progress_bars

        disable_progress_bars()
        self.model, self.folder, self.accelerator = model, folder, accelerator
        self.batch_size, self.half = batch_size, half
        self.computed, self.said = 0, Every()

    def __call__(self, images: Images, short_side: int | None = None, view: int = 0) -> Tensor:
        """Features (N, width) in float32 of all images, in order.

        Args:
            images: to compute.
            short_side: of the resize; default: see `FrozenModel.pixels`.
            view: 0 (default): the images as they are; else a random crop of at least 70 % of the
                area, and mirrored or not unless the images fill their frame.
        Raises:
            ConfigError: on all processes, if one of them cannot read an image or the features are
                not finite.
        """
        from accelerate.utils import gather_object

        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        starts, failed = range(0, len(images), PIECE), ""
        try:
            for number, start in enumerate(starts):
                if number % world == rank:
                    self._piece(images, start, short_side, view)
        except (ValueError, OSError) as error:
            failed = str(error)
        # All processes learn of an error, so that none waits for features that never come.
        failures = [line for line in gather_object([failed]) if line]
        if failures:
            raise ConfigError(failures[0])
        return torch.cat([self._piece(images, start, short_side, view) for start in starts])

    def _piece(self, images: Images, start: int, short_side: int | None, view: int) -> Tensor:
        """The features of one piece."""
        key = f"{self.model.key} {images.name} {images.stamp} {len(images)} {start} {short_side} {self.half}"
        if view:
            key += f" view {view}"

        def make() -> Iterator[tuple[Tensor, Tensor]]:
            yield from self._batches(images, start, short_side, view)

        features, labels = cached(self.folder, key, make, self.half)
        if not torch.equal(labels, images.labels[start : start + PIECE].long()):
            raise ConfigError(
                f"{self.folder}: the features of {images.name} are of other images; remove the folder"
            )
        return features

    def _batches(
        self, images: Images, start: int, short_side: int | None, view: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        end = min(start + PIECE, len(images))
        for first in range(start, end, self.batch_size):
            places = range(first, min(first + self.batch_size, end))
            pixels = torch.stack(
                [
                    self.model.pixels(viewed(images, i, view), images.squash, short_side)
                    for i in places
                ]
            )
            self.said(f"features of {images.name}: {first} of {len(images)} images")
            self.computed += len(places)
            features = self.model.features(pixels.to(self.accelerator.device))
            yield features.cpu(), images.labels[first : first + len(places)].long()


def viewed(images: Images, index: int, view: int) -> Any:
    """Image `index` as it is for view 0; else a mild crop, mirrored or not, of (view, index) alone."""
    image = images.read(index)
    if not view:
        return image
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop([image.height, image.width], scale=(MILD, 1.0), antialias=True)
    # A mirrored digit is no digit, and images that fill their frame are digits or stimuli.
    mirror = v2.RandomHorizontalFlip(0.0 if images.squash else 0.5)
    with keeping_random_state():
        seed_cpu(view, index)
        return mirror(crop(image))


def _rows(rows: folder.Rows, name: str, classes: Sequence[str]) -> Images:
    """The images of a listed folder."""
    return Images(
        name,
        lambda i: image_of(rows.paths[i]),
        torch.tensor(rows.labels),
        tuple(classes),
        stamp=stamp(rows.paths),
    )


def stamp(paths: Sequence[str]) -> str:
    """A hash of the names, sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        found = Path(path).stat() if Path(path).exists() else None
        seen = (path, found and found.st_size, found and found.st_mtime_ns)
        digest.update(repr(seen).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def image_of(path: str) -> Any:
    """A file as a PIL image in RGB. ConfigError, with the file's name, if it cannot be decoded."""
    try:
        return decode(path)
    except Exception as error:  # Pillow's plugins raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{folder.shown(path)} cannot be decoded ({reason})") from None
