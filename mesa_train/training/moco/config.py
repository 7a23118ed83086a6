"""Configuration of the MoCo v3 recipe. The defaults are the authors' ViT-S at batch 1024."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    ConfigError,
    Configuration,
    OneOf,
)
from mesa_train.training.data.config import DataConfig, check_path
from mesa_train.training.recipe_config import RunConfig, check_out, check_schedule


@dataclass(frozen=True)
class ModelConfig:
    """The encoder and the heads.

    Attributes:
        name: a timm model; default "moco_vit_small".
        dim: width of queries and keys; default 256.
        hidden: width of the heads' hidden layers; default 4096.
        projector_layers: default 3; the authors' ResNet-50 has 2.
        predictor_norm: end the predictor with a batch norm; default true; false for ResNet-50.
        temperature: default 0.2; 1.0 for ResNet-50.
        momentum: of the momentum encoder at the start; default 0.99; in [0, 1].
        momentum_cosine: raise the momentum to 1; default true.
        stop_grad_conv1: freeze the patch projection of a `moco_vit_*`; default true.
        grad_checkpointing: turn on timm's activation checkpointing; default false.
    """

    name: str = "moco_vit_small"
    dim: Annotated[int, POSITIVE] = 256
    hidden: Annotated[int, POSITIVE] = 4096
    projector_layers: Annotated[int, POSITIVE] = 3
    predictor_norm: bool = True
    temperature: Annotated[float, POSITIVE] = 0.2
    momentum: Annotated[float, PROBABILITY] = 0.99
    momentum_cosine: bool = True
    stop_grad_conv1: bool = True
    grad_checkpointing: bool = False


@dataclass(frozen=True)
class ViewsConfig:
    """The two augmentation pipelines. All that is not listed is as the authors have it.

    Attributes:
        crop_min: smallest share of the area in a crop; default 0.08; 0.2 for ResNet-50.
        hflip: probability of a horizontal flip; default 0.5. A mirrored digit is no digit.
        blur: largest radius of the blur in pixels; default 2.0, for images of 224 pixels.
    """

    crop_min: Annotated[float, PROBABILITY] = 0.08
    hflip: Annotated[float, PROBABILITY] = 0.5
    blur: Annotated[float, POSITIVE] = 2.0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        name: "adamw" (default) or "lars".
        lr: rate for a batch of 256, scaled with the global batch; default 1.5e-4.
        weight_decay: default 0.1. AdamW decays biases and norms too; LARS does not.
        warmup_epochs: default 40; fewer than `train.epochs`.
    """

    name: Annotated[str, OneOf(("adamw", "lars"))] = "adamw"
    lr: Annotated[float, POSITIVE] = 1.5e-4
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 40


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run. The defaults of the other fields are those of `RunConfig`.

    Attributes:
        epochs: default 300.
        global_batch: images in a step over all processes; default 1024. There is no accumulation:
            it would change negatives and statistics.
        chunk: images of a trunk forward, for gradient caching; default 0: all.
        knn_every: epochs between evaluations by nearest neighbours; default 1; 0: none.
        knn_images: most training images of that evaluation; default 20000.
        out: default "runs/mocov3".
    """

    epochs: Annotated[int, POSITIVE] = 300
    global_batch: Annotated[int, POSITIVE] = 1024
    chunk: Annotated[int, NOT_NEGATIVE] = 0
    knn_every: Annotated[int, NOT_NEGATIVE] = 1
    knn_images: Annotated[int, POSITIVE] = 20_000
    out: str = "runs/mocov3"


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipe, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        check_schedule(self)
        if self.views.crop_min <= 0:
            raise ConfigError("views.crop_min must be above 0, got 0")

    def check_files(self) -> None:
        """Raise ConfigError if the data is missing or `train.out` cannot be written."""
        check_path(self.data)
        check_out(self.train.out)


load, of_dict = Config.load, Config.of_dict
