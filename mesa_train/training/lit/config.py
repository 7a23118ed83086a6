"""Configuration of the LiT recipe. The defaults are a text tower of base size at batch 512."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    Configuration,
    OneOf,
)
from mesa_train.training.data import packaged
from mesa_train.training.recipe_config import OptimConfig, TrainConfig, check_schedule

# Names of prompt sets; `data.prompts` may also name a file.
PROMPTS = ("openai80", "clip_paper", "clip_best", "simple", "name")


@dataclass(frozen=True)
class ModelConfig:
    """The image tower.

    Attributes:
        name: a timm model, or a transformers folder; default "vit_base_patch16_224".
        weights: a file, or "pretrained" for timm; default: none, which are random weights of seed 0.
        image_size: in pixels; default: the model's own.
        locked: true (default): the image tower is frozen and its embeddings are computed once.
            False: both towers train, the image tower on images in every step.
    """

    name: str = "vit_base_patch16_224"
    weights: str | None = None
    image_size: Annotated[int | None, POSITIVE] = None
    locked: bool = True


@dataclass(frozen=True)
class TextConfig:
    """The text tower, open_clip's, without a causal mask.

    Attributes:
        width: default 512.
        layers: default 12.
        heads: default 8; divides the width.
        context: tokens of a text; default 16.
    """

    width: Annotated[int, POSITIVE] = 512
    layers: Annotated[int, POSITIVE] = 12
    heads: Annotated[int, POSITIVE] = 8
    context: Annotated[int, POSITIVE] = 16


@dataclass(frozen=True)
class DataConfig:
    """Images with captions, and images of the zero-shot evaluation.

    Attributes:
        train: "mnist5k" (default), "digits" or "scattered_digits", a folder of class folders, or a
            CSV file with the columns `file` and `caption`; `file` is relative to the CSV's folder.
        held_out: folder of class folders for the evaluation; a package has its own. Default: none,
            then a CSV is trained without an evaluation.
        class_names: text file with a name for each class folder, in the order of the sorted
            folders; default: the folders' names, or for ImageNet's folders CLIP's names.
        prompts: of the captions that are made from class names: a prompt set or a text file with a
            prompt in each line, {} for the name; default "simple".
        sets: root folder of imagenet-a, -r, -v2, objectnet, and imagenet-val for ReaL, for
            ImageNet's classes; default: none.
        crop_min: smallest share of the area in a random crop, when the image tower trains; default
            1: no crop.
        workers: loader processes, when the image tower trains; default 0.
    """

    train: str = "mnist5k"
    held_out: str | None = None
    class_names: str | None = None
    prompts: str = "simple"
    sets: str | None = None
    crop_min: Annotated[float, POSITIVE] = 1.0
    workers: Annotated[int, NOT_NEGATIVE] = 0

    def check(self) -> None:
        """Raise ConfigError if a file is missing."""
        for key in ("held_out", "class_names", "sets"):
            path = getattr(self, key)
            if path and not Path(path).exists():
                raise ConfigError(f"data.{key}: no such file or folder {path}")
        if self.train not in packaged.BUILTIN and not Path(self.train).exists():
            raise ConfigError(
                f"data.train must be one of {', '.join(packaged.BUILTIN)}, a folder or a CSV file; "
                f"there is no {self.train}"
            )
        if self.train in packaged.BUILTIN and self.held_out:
            raise ConfigError(f"data.held_out: {self.train} has its own held-out images")
        if Path(self.train).is_dir() and not self.held_out:
            raise ConfigError("data.held_out is missing: a folder of class folders")
        if self.prompts not in PROMPTS and not Path(self.prompts).is_file():
            raise ConfigError(
                f"data.prompts must be one of {', '.join(PROMPTS)} or a file, got {self.prompts!r}"
            )
        if self.crop_min > 1:
            raise ConfigError(f"data.crop_min must be at most 1, got {self.crop_min:g}")


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss over the images and texts of all processes.

    Attributes:
        name: "softmax" (default), or "sigmoid" of each pair.
        temperature: initial factor of the cosines, which is learned; default 10.
        bias: initial bias of the sigmoid's logits, which is learned; default -10.
    """

    name: Annotated[str, OneOf(("softmax", "sigmoid"))] = "softmax"
    temperature: Annotated[float, POSITIVE] = 10.0
    bias: float = -10.0


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipe, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(global_batch=512, out="runs/lit")
    )

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        check_schedule(self)
        if self.text.width % self.text.heads:
            raise ConfigError(
                f"text.heads={self.text.heads} must divide text.width={self.text.width}"
            )
        if self.train.global_batch < 2:
            raise ConfigError("train.global_batch must be at least 2: the loss compares pairs")


load, of_dict = Config.load, Config.of_dict
