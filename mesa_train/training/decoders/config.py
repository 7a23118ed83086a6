"""Configuration of the decoders' recipe: segmentation and depth on a ViT's feature maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    ConfigError,
    Configuration,
    OneOf,
    Range,
)
from mesa_train.training.recipe_config import OptimConfig, TrainConfig, check_schedule

TASKS = {"segmentation": ("linear", "upernet"), "depth": ("linear", "dpt")}
LOSSES = ("log1p_mse", "scale_invariant", "dinov2")
PACKAGED = {"segmentation": ("composed",), "depth": ("rooms", "motorcycle")}


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and its decoder.

    Attributes:
        name: a timm model or a transformers folder; default "vit_base_patch16_224".
        weights: a file, or "pretrained" for timm; default: none, which are random weights of seed 0.
        frozen: train the decoder alone; default true. False trains the backbone too.
        decoder: "linear" (default) or "upernet" for segmentation, "linear" or "dpt" for depth.
        channels: of UperNet's and DPT's maps; default: 512 and 64.
        aux_weight: of UperNet's second head, on the third map; default 0.4; 0: none.
    """

    name: str = "vit_base_patch16_224"
    weights: str | None = None
    frozen: bool = True
    decoder: Annotated[str, OneOf(("linear", "upernet", "dpt"))] = "linear"
    channels: Annotated[int | None, POSITIVE] = None
    aux_weight: Annotated[float, NOT_NEGATIVE] = 0.4


@dataclass(frozen=True)
class DataConfig:
    """Pictures with maps.

    Attributes:
        task: "segmentation" (default) or "depth".
        source: "folder" (default). "composed": digits on photographs, for segmentation. "rooms":
            digits on a floor in front of a wall, with exact depth. "motorcycle": scikit-image's
            stereo photograph with measured depth: its left half trains, its right half tests.
        path: the folder. Pictures are images/SPLIT/NAME.jpg. Class maps are
            annotations/SPLIT/NAME.png, depth maps depth/SPLIT/NAME.png, .npy or .npz. "composed"
            writes its pictures there.
        train_split: default "training".
        val_split: default "validation".
        classes: of segmentation; default: the lines of PATH/classes.txt.
        zero_ignored: value 0 of a class map is no class; default true, as in ADE20K.
        depth_unit: metres of the value 1 in a depth map; default 0.001. The value 0 is no depth.
        image_size: side of a crop and of a window in pixels; a multiple of the patch; default 224.
        stride: of the evaluation's windows in pixels; default: two thirds of `image_size`.
        fraction: share of the training pictures, above 0 and at most 1; default 1. The smaller of
            two fractions is a part of the larger one.
        fraction_seed: which pictures these are; default 0.
        repeats: crops of a training picture in an epoch; default 1.
        scale: range of a crop's share of the picture's area; default (0.2, 1.0). A crop of a part is
            enlarged, so with a small share a thing looks nearer than its depth.
        ratio: range of a crop's aspect ratio; default (3/4, 4/3).
        hflip: probability of a mirror image; default 0.5.
        class_share: largest share of a class among a crop's labelled pixels; default 1. Below 1, up to
            10 crops are drawn until one keeps to it, as Segmenter does with 0.75.
        distortion: change brightness, contrast, saturation and hue, each with probability 0.5; default
            false.
        pictures: training pictures of "composed" and "rooms"; default 160. A quarter as many are
            held out.
    """

    task: Annotated[str, OneOf(TASKS)] = "segmentation"
    source: Annotated[str, OneOf(("folder", "composed", "rooms", "motorcycle"))] = "folder"
    path: str | None = None
    train_split: str = "training"
    val_split: str = "validation"
    classes: Annotated[int | None, POSITIVE] = None
    zero_ignored: bool = True
    depth_unit: Annotated[float, POSITIVE] = 0.001
    image_size: Annotated[int, POSITIVE] = 224
    stride: Annotated[int | None, POSITIVE] = None
    fraction: Annotated[float, PROBABILITY] = 1.0
    fraction_seed: Annotated[int, NOT_NEGATIVE] = 0
    repeats: Annotated[int, POSITIVE] = 1
    scale: Annotated[tuple[float, float], Range(1.0)] = (0.2, 1.0)
    ratio: Annotated[tuple[float, float], Range()] = (3 / 4, 4 / 3)
    hflip: Annotated[float, PROBABILITY] = 0.5
    class_share: Annotated[float, PROBABILITY] = 1.0
    distortion: bool = False
    pictures: Annotated[int, POSITIVE] = 160

    def check(self) -> None:
        """Raise ConfigError if settings do not fit together."""
        if self.source not in ("folder", *PACKAGED[self.task]):
            raise ConfigError(
                f"data.source={self.source} is not for data.task={self.task}; take folder or "
                f"{' or '.join(PACKAGED[self.task])}"
            )
        if self.source in ("folder", "composed") and not self.path:
            raise ConfigError(f"data.path is missing: {self.source} needs a folder")
        if self.source == "folder" and not Path(str(self.path)).is_dir():
            raise ConfigError(f"data.path: no such folder {self.path}")
        if self.fraction <= 0:
            raise ConfigError("data.fraction must be above 0, got 0")
        if self.class_share <= 0:
            raise ConfigError("data.class_share must be above 0, got 0")
        if self.class_share < 1 and self.task == "depth":
            raise ConfigError(
                f"data.class_share={self.class_share:g} is for data.task=segmentation"
            )

    @property
    def window_stride(self) -> int:
        """The stride of the windows in pixels."""
        return self.stride or max(1, self.image_size * 2 // 3)


@dataclass(frozen=True)
class LossConfig:
    """The loss of depth. Segmentation has the cross-entropy.

    Attributes:
        depth: "log1p_mse" (default), "scale_invariant" or "dinov2".
    """

    depth: Annotated[str, OneOf(LOSSES)] = "log1p_mse"


@dataclass(frozen=True)
class DecoderOptimConfig(OptimConfig):
    """The optimizer of a decoder; more settings of `OptimConfig`.

    Attributes:
        name: "adamw" (default) or "sgd".
        momentum: of SGD; default 0.9.
        schedule: after the warm-up: "cosine" (default) to 0, or "poly" to 1 % of the peak by the
            power 0.9.
    """

    name: Annotated[str, OneOf(("adamw", "sgd"))] = "adamw"
    momentum: Annotated[float, SHARE] = 0.9
    schedule: Annotated[str, OneOf(("cosine", "poly"))] = "cosine"


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipe, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: DecoderOptimConfig = field(default_factory=DecoderOptimConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(global_batch=16, out="runs/decoders")
    )

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        check_schedule(self)
        allowed = TASKS[self.data.task]
        if self.model.decoder not in allowed:
            raise ConfigError(
                f"model.decoder={self.model.decoder} is not for data.task={self.data.task}; take "
                f"{' or '.join(allowed)}"
            )


load, of_dict = Config.load, Config.of_dict
