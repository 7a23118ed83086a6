"""The sections `data` and `augment` of a recipe's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesa_train.training.config_schema import ConfigError, one_of

FILES = ("parquet", "arrow")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cut.

    source: mnist5k or digits (they ship with packages), imagefolder, parquet, arrow, or the name of
        a data set on a hub. path: the folder of train/CLASS/*.jpg for imagefolder, of train*.parquet
        or train/*.parquet for files, and so on for val_split. streaming needs train_images.
    crop: False resizes the test image to the square, as at 384 px; True takes the centre crop.
    on_corrupt: "raise" stops at an image that cannot be decoded, "skip" takes the next one.
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
    """timm's names; `rand_augment` "" turns it off. Label smoothing applies without mixup too."""

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
    """ConfigError for a source that lacks what it needs."""
    one_of("data.on_corrupt", data.on_corrupt, ("raise", "skip"))
    if data.source in ("imagefolder", *FILES) and not data.path:
        raise ConfigError(f"data.path is missing: {data.source} needs a folder")
    if data.streaming and not data.train_images:
        raise ConfigError("data.train_images is missing: streaming cannot count the images")
    if data.workers < 0:
        raise ConfigError(f"data.workers must not be negative, got {data.workers}")


def check_path(data: DataConfig) -> None:
    """ConfigError for a folder or file that is not there."""
    if data.path and not Path(data.path).exists():
        raise ConfigError(f"data.path: no such folder or file {data.path}")
