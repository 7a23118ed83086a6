"""Configuration sections `data` and `augment` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesa_train.training.config_schema import ConfigError, one_of

FILES = ("parquet", "arrow")


@dataclass(frozen=True)
class DataConfig:
    """The data set and its loader.

    Attributes:
        source: "mnist5k" (default) or "digits" (shipped in packages), "imagefolder", "parquet",
            "arrow", or the name of a data set on a hub.
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
    train_images: int | None = None
    train_split: str = "train"
    val_split: str = "validation"
    image_key: str = "image"
    label_key: str = "label"
    image_size: int = 224
    crop: bool = True
    workers: int = 8
    pin_memory: bool = True
    on_corrupt: str = "raise"


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, with timm's names.

    Attributes:
        scale: range of the crop's area; default (0.08, 1.0); within (0, 1].
        ratio: range of the crop's aspect ratio; default (3/4, 4/3); above 0.
        hflip: probability of a horizontal flip; default 0.5; in [0, 1].
        color_jitter: strength; default 0.4; at least 0.
        rand_augment: timm's policy text; default "rand-m9-mstd0.5-inc1"; "" turns it off.
        erase: probability of random erasing; default 0.25; in [0, 1).
        mixup: alpha; default 0.8; 0 turns it off.
        cutmix: alpha; default 1.0; 0 turns it off.
        label_smoothing: default 0.1; in [0, 1). Applies without mixup too.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1


def check_data(data: DataConfig) -> None:
    """Check that the source has the settings that it needs.

    Raises:
        ConfigError: names the key.
    """
    one_of("data.on_corrupt", data.on_corrupt, ("raise", "skip"))
    if data.source in ("imagefolder", *FILES) and not data.path:
        raise ConfigError(f"data.path is missing: {data.source} needs a folder")
    if data.streaming and not data.train_images:
        raise ConfigError("data.train_images is missing: streaming cannot count the images")
    if data.workers < 0:
        raise ConfigError(f"data.workers must not be negative, got {data.workers}")


def check_path(data: DataConfig) -> None:
    """Raise ConfigError if `data.path` does not exist."""
    if data.path and not Path(data.path).exists():
        raise ConfigError(f"data.path: no such folder or file {data.path}")
