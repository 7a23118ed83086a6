"""Images by index, with their paths: from a folder, through `datasets`, or from a package.

This file also handles images that cannot be decoded. A sample depends on (seed, epoch, index) only,
because each sample seeds its own random augmentation. The number of workers, or a resume in the
middle of an epoch, does not change it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mesa_train.training.config_schema import ConfigError

from . import folder, hub
from . import packaged as builtin
from .config import AugmentConfig, DataConfig
from .decode import decode as _decode
from .image_records import CorruptImage as CorruptImage
from .image_records import Records as Records
from .image_records import Sources as Sources

IGNORED = -1
Sample = tuple[Tensor, int, list[str]]
# Errors of a data set, each of one line.
MISTAKES = (CorruptImage, ConfigError)


def load(config: DataConfig, classes: int | None) -> Sources:
    """Open a data set.

    Args:
        config: the section `data`.
        classes: configured number of classes; None if it is not configured.
    Raises:
        ConfigError: a split, a column or the number of classes does not fit.
    """
    if config.source in builtin.BUILTIN:
        found = _builtin(config)
    elif config.source == "imagefolder":
        found = _folder(config)
    else:
        found = hub.load(config, classes)
    if classes is not None and classes != found.classes:
        raise ConfigError(f"model.classes={classes} but {config.source} has {found.classes}")
    return found


def _builtin(config: DataConfig) -> Sources:
    """The records of an image set shipped in a package."""
    images = builtin.load(config.source)

    def records(split: builtin.Split, name: str) -> Records:
        pixels, labels = split.images.squeeze(1).numpy(), split.labels.tolist()
        return Records(lambda i: (pixels[i], labels[i], f"{name}[{i}]"), len(labels))

    return Sources(
        records(images.train, f"{config.source}/train"),
        records(images.held_out, f"{config.source}/validation"),
        images.num_classes,
    )


def _folder(config: DataConfig) -> Sources:
    """The records of an image folder."""
    columns = (("image_key", config.image_key, "image"), ("label_key", config.label_key, "label"))
    for field, asked, own in columns:
        if asked != own:
            raise ConfigError(f"data.{field}: imagefolder has no column {asked!r}; image, label")
    path = Path(str(config.path))
    train, val, classes = folder.load(str(path / config.train_split), str(path / config.val_split))

    def records(split: folder.Rows, count: int) -> Records:
        if config.streaming:
            return Records(lambda row: _of_path(row["image"]["path"], row["label"]), count, split)
        return Records(lambda i: _of_path(split.paths[i], split.labels[i]), len(split))

    return Sources(records(train, config.train_images or 0), records(val, 0), len(classes))


def _of_path(path: str, label: int) -> tuple[str, int, str]:
    """The record of a file: (path, label, path for messages)."""
    return path, label, folder.shown(path)


def transforms(config: DataConfig, augment: AugmentConfig) -> tuple[Any, Any]:
    """timm's transforms (for training, for validation).

    Validation resizes to 256/224 of the image size, then crops.

    Raises:
        ConfigError: timm does not accept `rand_augment`.
    """
    from timm.data import create_transform

    size = (3, config.image_size, config.image_size)
    common: Any = {"input_size": size, "interpolation": augment.interpolation}
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


class Samples(Dataset[Sample]):
    """Samples of a data set: (epoch, index) to (image, label, skipped paths).

    An index of -1 is padding: a black image with the label `IGNORED`. With `on_corrupt="skip"`, the
    next index replaces a training image that cannot be decoded. A validation image
    (`replace=False`) is ignored.
    """

    def __init__(
        self, records: Records, transform: Any, size: int, seed: int, on_corrupt: str, replace: bool
    ) -> None:
        self.records, self.transform, self.size = records, transform, size
        self.seed, self.on_corrupt, self.replace = seed, on_corrupt, replace
        self.reason = ""

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        """The samples of a batch. PyTorch's loader calls this method.

        An error of the data set is returned, and the loader raises it. If a worker process raised
        it, PyTorch would put the traceback into the message.
        """
        try:
            return [self[key] for key in keys]
        except MISTAKES as error:
            return [error]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
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
        raise CorruptImage(f"none of {self.records.count} images can be decoded: {self.reason}")

    def of_record(
        self, epoch: int, position: int, key: Any
    ) -> tuple[Tensor | None, int, list[str]]:
        """Read and transform one record.

        Any error of reading, decoding or transforming counts as a corrupt image. Pillow and its
        plugins raise errors of many types, also for pictures that are too large (decompression
        bombs).

        Returns:
            (image, label, no paths), or (None, IGNORED, its path) if the image is corrupt.
        """
        path = f"image {position}"
        try:
            encoded, label, path = self.records.read(key)
            image = _decode(encoded)
            with keeping_random_state():
                seed_cpu(self.seed, epoch, position)
                return self.transform(image), label, []
        except ConfigError:  # a wrong label
            raise
        except Exception as error:
            self.reason = f"{path} cannot be decoded ({_in_a_line(error)})"
            if self.on_corrupt == "raise":
                raise CorruptImage(
                    f"{self.reason}; data.on_corrupt=skip trains without such images"
                ) from None
            return None, IGNORED, [path]


def _in_a_line(error: Exception) -> str:
    """An error's message in one line; its type if the message is empty."""
    text = folder.shown(" ".join(str(error).split()))
    return text or type(error).__name__


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Context manager: restore the random generators of Python, NumPy and torch at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_cpu(*numbers: int) -> int:
    """Seed the CPU generators of Python, NumPy and torch from several numbers. Returns the seed.

    Transforms of an image use no other generator. `torch.manual_seed` also seeds every accelerator. In a
    process that has not initialised CUDA, as a loader's worker, each call then formats three stack
    traces, which takes 0.5 ms or more. The CPU generator alone takes 2 us.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's mixup uses NumPy's generator
    torch.default_generator.manual_seed(seed)
    return seed


def seed_all(*numbers: int) -> None:
    """Seed the CPU generators, and those of the accelerators if there are any, from several numbers."""
    seed = seed_cpu(*numbers)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train_order(
    count: int, *, seed: int, epoch: int, first: int, rank: int, world: int, micro: int, accum: int
) -> Iterator[list[tuple[int, int]]]:
    """One rank's whole micro-batches of an epoch, from optimizer step `first`.

    Step, micro-step and rank cut the same permutation for any number of ranks.
    """
    order = permutation(count, seed, epoch)
    batch = micro * accum * world
    for step in range(first, count // batch):
        for turn in range(accum):
            start = step * batch + (turn * world + rank) * micro
            yield [(epoch, int(i)) for i in order[start : start + micro]]


def val_order(count: int, *, rank: int, world: int, batch: int) -> Iterator[list[tuple[int, int]]]:
    """One rank's share in order, padded so that all ranks have the same number of batches."""
    for start in range(0, count, batch * world):
        own = range(start + rank * batch, start + (rank + 1) * batch)
        yield [(0, i if i < count else -1) for i in own]


def collate(samples: list[Any]) -> tuple[Tensor, Tensor, list[str]] | Exception:
    """Stack samples into a batch.

    Returns:
        Images (N, 3, H, W), labels (N,), skipped paths; or the first error among the samples.
    """
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    images, labels, skipped = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [path for paths in skipped for path in paths]
