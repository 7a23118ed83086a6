"""Images for the ViT-22B recipes: the paper's crops, pixels from -1 to 1.

All recipes share the sources: folders, parquet files, a hub's data sets, packaged sets. A global
batch depends on (seed, step) only. Each data-parallel rank reads its own part of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mesa_train.training.data import sources
from mesa_train.training.data.config import DataConfig
from mesa_train.training.data.loader import Loader

from .config import Config, ConfigError, accumulation

_log = logging.getLogger(__name__)
_PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def transforms(data: DataConfig, augment: Any, crop: float = 0.875) -> tuple[Any, Any]:
    """Transforms of PIL images (for training, for validation).

    Args:
        data: the section `data`.
        augment: with `scale` and `ratio` of random crops, and `hflip`, the probability of a flip.
        crop: central share of a validation image; default 0.875.
    """
    from timm.data import create_transform

    shape = (3, data.image_size, data.image_size)
    train = create_transform(
        shape,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        auto_augment=None,
        color_jitter=None,
        **_PIXELS,
    )
    return train, create_transform(shape, crop_pct=crop, interpolation="bicubic", **_PIXELS)


def load(config: Config) -> sources.Sources:
    """Open the data.

    Raises:
        ConfigError: the data is missing, or smaller than one batch.
    """
    found = sources.load(config.data, config.model.classes)
    if found.train.count < config.train.global_batch:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} exceeds the {found.train.count} images"
        )
    return found


def batches(
    config: Config, found: sources.Sources, rank: int, ranks: int, first: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """This rank's micro-batches (images, labels) of each step, from step `first`."""
    train = config.train
    per_epoch = found.train.count // train.global_batch
    accumulated = accumulation(train, ranks)
    images = Loader(
        found,
        transforms(config.data, config.augment),
        config.data,
        batch_size=train.micro_batch,
        seed=train.seed,
        steps_per_epoch=per_epoch,
        accumulation=accumulated,
        rank=rank,
        world=ranks,
        pin_memory=config.data.pin_memory and torch.cuda.is_available(),
    )
    step = first
    while step < train.steps:
        epoch, start = divmod(step, per_epoch)
        micro = images.training(epoch, start)
        for _ in range(start, min(per_epoch, train.steps - epoch * per_epoch)):
            taken = [next(micro) for _ in range(accumulated)]
            for _, _, skipped in taken:
                if skipped:
                    _log.warning("skipped %s", ", ".join(skipped))
            yield [(pictures, labels) for pictures, labels, _ in taken]
            step += 1
