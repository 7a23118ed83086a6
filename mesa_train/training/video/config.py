"""Configuration of the video probe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ConfigError,
    Configuration,
    OneOf,
)
from mesa_train.training.recipe_config import OptimConfig, TrainConfig, check_schedule


@dataclass(frozen=True)
class ModelConfig:
    """The frozen image model.

    Attributes:
        name: a timm model, or a transformers folder; default "vit_base_patch16_224".
        weights: a file, or "pretrained" for timm; default: none, which are random weights of seed 0.
        image_size: in pixels; default: the model's own.
    """

    name: str = "vit_base_patch16_224"
    weights: str | None = None
    image_size: Annotated[int | None, POSITIVE] = None


@dataclass(frozen=True)
class ProbeConfig:
    """The trained transformer over the frames of a clip.

    Attributes:
        layers: default 4; 0 is a Linear of the frames' mean, which does not see their order.
        width: default: the features' width.
        heads: default 8; divides the width.
        dropout: default 0.1.
    """

    layers: Annotated[int, NOT_NEGATIVE] = 4
    width: Annotated[int | None, POSITIVE] = None
    heads: Annotated[int, POSITIVE] = 8
    dropout: Annotated[float, SHARE] = 0.1


@dataclass(frozen=True)
class DataConfig:
    """Clips with labels.

    Attributes:
        source: "folder" (default), or "moving_digits": MNIST digits that move in one of eight
            directions, which is the label.
        path: the folder. A clip is a folder of frames PATH/SPLIT/CLASS/CLIP/*.jpg in the order of
            their names, or a file PATH/SPLIT/CLASS/CLIP.mp4, which needs PyAV.
        train_split: default "train".
        val_split: default "validation".
        frames: of a clip, at equal distances; default 8.
        clips: training clips of moving_digits; default 800. A quarter is held out.
    """

    source: Annotated[str, OneOf(("folder", "moving_digits"))] = "folder"
    path: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    frames: Annotated[int, POSITIVE] = 8
    clips: Annotated[int, POSITIVE] = 800

    def check(self) -> None:
        """Raise ConfigError if the source lacks a setting that it needs."""
        if self.source == "folder" and not self.path:
            raise ConfigError("data.path is missing: folder needs PATH/SPLIT/CLASS/CLIP")
        if self.source == "folder" and not Path(str(self.path)).is_dir():
            raise ConfigError(f"data.path: no such folder {self.path}")


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipe, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/video"))

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        check_schedule(self)
        if self.probe.width and self.probe.width % self.probe.heads:
            raise ConfigError(
                f"probe.heads={self.probe.heads} must divide probe.width={self.probe.width}"
            )


load, of_dict = Config.load, Config.of_dict
