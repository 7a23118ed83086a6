"""Images by index through `datasets` or from a package, with their paths, and what to do when one
cannot be decoded.

A sample depends on (seed, epoch, index) alone: its random augmentation is drawn from a stream of
its own, so that neither the number of workers nor a resume in the middle of an epoch changes it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from . import data as builtin
from .config import FILES, AugmentConfig, ConfigError, DataConfig

_log = logging.getLogger(__name__)
IGNORED = -1


class CorruptImage(RuntimeError):
    """An image that cannot be decoded; the message names its path."""


@dataclass(frozen=True)
class Records:
    """Encoded or decoded images: `read(key)` gives (bytes or image, label, path).

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


def load(config: DataConfig, classes: int | None) -> Sources:
    """Open a data set. ConfigError if a split, a column or the class count does not fit."""
    if config.source in builtin.BUILTIN:
        found = _builtin(config)
    else:
        found = _datasets(config, classes)
    if classes is not None and classes != found.classes:
        raise ConfigError(f"model.classes={classes} but {config.source} has {found.classes}")
    return found


def _builtin(config: DataConfig) -> Sources:
    images = builtin.load(config.source)

    def records(split: builtin.Split, name: str) -> Records:
        pixels, labels = split.images.squeeze(1).numpy(), split.labels.tolist()
        return Records(lambda i: (pixels[i], labels[i], f"{name}[{i}]"), len(labels))

    return Sources(
        records(images.train, f"{config.source}/train"),
        records(images.held_out, f"{config.source}/validation"),
        images.num_classes,
    )


def _datasets(config: DataConfig, wanted: int | None) -> Sources:
    kind = config.source
    options: dict[str, Any] = {"data_dir": config.path} if config.path else {}
    if kind in FILES:
        options = {"data_files": _files(config)}
    import datasets

    try:
        found = datasets.load_dataset(kind, streaming=config.streaming, **options)
    except (OSError, ValueError, RuntimeError) as error:
        near = difflib.get_close_matches(kind, [*builtin.BUILTIN, "imagefolder", *FILES], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"data.source={kind}: {' '.join(str(error).split())}{hint}") from None
    for name, split in (("train", config.train_split), ("val", config.val_split)):
        if split not in found:
            raise ConfigError(
                f"data.{name}_split: {kind} has no split {split!r}; it has {', '.join(found)}"
            )
    train, val = found[config.train_split], found[config.val_split]
    features = train.features or {}
    for field, key in (("image_key", config.image_key), ("label_key", config.label_key)):
        if key not in features:
            raise ConfigError(f"data.{field}: {kind} has no column {key!r}; {', '.join(features)}")
    classes = getattr(features[config.label_key], "num_classes", None)
    if classes is None and config.streaming:
        if wanted is None:
            raise ConfigError("model.classes is missing: a stream cannot be searched for them")
        classes = wanted
    elif classes is None:
        classes = 1 + max(train[config.label_key])

    def records(split: Any, count: int) -> Records:
        split = split.cast_column(config.image_key, datasets.Image(decode=False))

        def of_row(row: Any) -> tuple[Any, int, str]:
            image = row[config.image_key]
            path = image["path"] or f"an image of {config.source}"
            return image["bytes"] or path, row[config.label_key], path

        def of_index(index: int) -> tuple[Any, int, str]:
            encoded, label, path = of_row(split[index])
            return encoded, label, path if encoded is path else f"{path} (image {index})"

        if config.streaming:
            return Records(of_row, count, split)
        return Records(of_index, len(split))

    return Sources(records(train, config.train_images or 0), records(val, 0), classes)


def _files(config: DataConfig) -> dict[str, list[str]]:
    """Each split's files: SPLIT*.KIND in the folder, or all of a folder SPLIT as `datasets` saves."""
    folder, found = Path(config.path or "."), {}
    for name, split in (("train", config.train_split), ("val", config.val_split)):
        files = [
            *folder.glob(f"{split}*.{config.source}"),
            *folder.glob(f"{split}/*.{config.source}"),
        ]
        if not files:
            raise ConfigError(
                f"data.{name}_split: {folder} has neither {split}*.{config.source} nor "
                f"{split}/*.{config.source}"
            )
        found[split] = sorted(map(str, files))
    return found


def transforms(config: DataConfig, augment: AugmentConfig) -> tuple[Any, Any]:
    """timm's transforms for training and for testing (resize to 256/224 of the size, then crop).

    ConfigError for a `rand_augment` that timm does not read.
    """
    from timm.data import create_transform

    common = {"input_size": (3, config.image_size, config.image_size), "interpolation": "bicubic"}
    try:
        train = create_transform(
            **common,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.rand_augment or None,
            re_prob=augment.erase,
            re_mode="pixel",
            re_count=1,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augment.rand_augment={augment.rand_augment!r} is no policy of timm's: {error}"
        ) from None
    test = create_transform(
        **common,
        crop_pct=224 / 256 if config.crop else 1.0,
        crop_mode="center" if config.crop else "squash",
    )
    return train, test


class Samples(Dataset[tuple[Tensor, int, list[str]]]):
    """(image, label, paths that could not be decoded) of an (epoch, index) pair.

    An index of -1 is padding: a black image with the label `IGNORED`. With `on_corrupt="skip"` a
    training image that fails gives way to the next index, a test image (`replace=False`) is ignored.
    """

    def __init__(
        self, records: Records, transform: Any, size: int, seed: int, on_corrupt: str, replace: bool
    ) -> None:
        self.records, self.transform, self.size = records, transform, size
        self.seed, self.on_corrupt, self.replace = seed, on_corrupt, replace

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        epoch, index = key
        empty = torch.zeros(3, self.size, self.size)
        if index < 0:
            return empty, IGNORED, []
        skipped: list[str] = []
        for offset in range(self.records.count):
            position = (index + offset) % self.records.count
            image, label, missing = self.of_record(epoch, position, position)
            skipped += missing
            if image is not None:
                return image, label, skipped
            if not self.replace:
                return empty, IGNORED, skipped
        raise CorruptImage(f"none of {self.records.count} images can be decoded")

    def of_record(
        self, epoch: int, position: int, key: Any
    ) -> tuple[Tensor | None, int, list[str]]:
        """(image, label, no paths) of one record, or (None, IGNORED, its path) if it is corrupt."""
        encoded, label, path = self.records.read(key)
        try:
            image = _decode(encoded)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            if self.on_corrupt == "raise":
                raise CorruptImage(
                    f"{path} cannot be decoded ({error}); "
                    "data.on_corrupt=skip trains without such images"
                ) from None
            return None, IGNORED, [path]
        with keeping_random_state():
            seed_all(self.seed, epoch, position)
            return self.transform(image), label, []


def _decode(encoded: Any) -> Image.Image:
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded).convert("RGB")
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """What is drawn inside leaves python's, numpy's and torch's streams as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_all(*numbers: int) -> None:
    """Seed python's, numpy's and torch's streams from several numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's mixup draws from the global stream
    torch.manual_seed(seed)


def train_order(
    count: int, *, seed: int, epoch: int, first: int, rank: int, world: int, micro: int, accum: int
) -> Iterator[list[tuple[int, int]]]:
    """One rank's micro-batches of an epoch from optimizer step `first` on, incomplete ones dropped.

    Step, micro-step and rank cut the same permutation whatever the number of ranks.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    batch = micro * accum * world
    for step in range(first, count // batch):
        for turn in range(accum):
            start = step * batch + (turn * world + rank) * micro
            yield [(epoch, int(i)) for i in order[start : start + micro]]


def val_order(count: int, *, rank: int, world: int, batch: int) -> Iterator[list[tuple[int, int]]]:
    """One rank's share in order; padded so that every rank makes equally many batches."""
    for start in range(0, count, batch * world):
        own = range(start + rank * batch, start + (rank + 1) * batch)
        yield [(0, i if i < count else -1) for i in own]


def collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, H, W), labels (N,), paths that were skipped."""
    images, labels, skipped = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [path for paths in skipped for path in paths]
