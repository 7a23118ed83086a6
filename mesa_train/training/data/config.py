"""Configuration sections `data` and `augment` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    ConfigError,
    OneOf,
    Range,
)

FILES = ("parquet", "arrow")


@dataclass(frozen=True)
class DataConfig:
    """The data set and its loader.

    Attributes:
        source: "mnist5k" (default), "digits" or "scattered_digits" (shipped in packages),
            "imagefolder", "parquet", "arrow", or the name of a data set on a hub.
        path: for imagefolder: the folder of train/CLASS/*.jpg. For parquet and arrow: the folder of
            train*.parquet or train/*.parquet. The same for `val_split`. Default: none.
        streaming: read the data set as a stream; needs `train_images`; default false.
        train_images: number of training images; default: counted.
        train_split: default "train".
        val_split: default "validation".
        image_key: column of the images; default "image".
        label_key: column of the labels; default "label".
        image_size: in pixels; default 224; above 0.
        crop: for validation images. True (default): centre crop. False: resize to the square, as at
            384 px.
        workers: loader processes; default 8; at least 0.
        pin_memory: of the loader; default true.
        on_corrupt: for an image that cannot be decoded. "raise" (default) stops, "skip" takes the
            next image.
    """

    source: str = "mnist5k"
    path: str | None = None
    streaming: bool = False
    train_images: Annotated[int | None, NOT_NEGATIVE] = None
    train_split: str = "train"
    val_split: str = "validation"
    image_key: str = "image"
    label_key: str = "label"
    image_size: Annotated[int, POSITIVE] = 224
    crop: bool = True
    workers: Annotated[int, NOT_NEGATIVE] = 8
    pin_memory: bool = True
    on_corrupt: Annotated[str, OneOf(("raise", "skip"))] = "raise"

    def check(self) -> None:
        """Raise ConfigError if the source lacks a setting that it needs."""
        if self.source in ("imagefolder", *FILES) and not self.path:
            raise ConfigError(f"data.path is missing: {self.source} needs a folder")
        if self.streaming and not self.train_images:
            raise ConfigError("data.train_images is missing: streaming cannot count the images")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, with timm's names.

    Attributes:
        scale: range of the crop's area; default (0.08, 1.0); within (0, 1].
        interpolation: of resized images, in training and validation: "bicubic" (default) or
            "bilinear".
        ratio: range of the crop's aspect ratio; default (3/4, 4/3); above 0.
        hflip: probability of a horizontal flip; default 0.5; in [0, 1].
        color_jitter: strength; default 0.4; at least 0.
        rand_augment: timm's policy text; default "rand-m9-mstd0.5-inc1"; "" turns it off.
        erase: probability of random erasing; default 0.25; in [0, 1).
        mixup: alpha; default 0.8; 0 turns it off.
        cutmix: alpha; default 1.0; 0 turns it off.
        label_smoothing: default 0.1; in [0, 1). Applies without mixup too.
    """

    scale: Annotated[tuple[float, float], Range(1.0)] = (0.08, 1.0)
    interpolation: Annotated[str, OneOf(("bicubic", "bilinear"))] = "bicubic"
    ratio: Annotated[tuple[float, float], Range()] = (3 / 4, 4 / 3)
    hflip: Annotated[float, PROBABILITY] = 0.5
    color_jitter: Annotated[float, NOT_NEGATIVE] = 0.4
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erase: Annotated[float, SHARE] = 0.25
    mixup: Annotated[float, NOT_NEGATIVE] = 0.8
    cutmix: Annotated[float, NOT_NEGATIVE] = 1.0
    label_smoothing: Annotated[float, SHARE] = 0.1


def check_path(data: DataConfig) -> None:
    """Raise ConfigError if `data.path` does not exist."""
    if data.path and not Path(data.path).exists():
        raise ConfigError(f"data.path: no such folder or file {data.path}")
