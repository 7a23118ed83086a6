"""Configuration of the dense recipes. The defaults are LITv2's authors' RetinaNet with S, 1x."""

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
from mesa_train.training.recipe_config import RunConfig, check_out

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")
SEGMENTER = "semantic_fpn"
FORMATS = {
    "detection": ("coco", "voc", "datasets", "digits"),
    "segmentation": ("ade", "voc", "datasets", "digits"),
}
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its initial weights.

    Attributes:
        kind: "retinanet" (default), "faster_rcnn", "mask_rcnn" or "semantic_fpn".
        backbone: a timm model with maps, LITv2's included, or a plain ViT; default "litv2_s".
            "hf:NAME" is a backbone of Hugging Face's transformers: a folder with a config.json, a
            model type such as "swin", or a name on a hub.
        window: of LITv2's stage 3 (the authors have 2 and 4), or of a plain ViT's blocks; default
            0: 2 for LITv2, 14 for a plain ViT.
        global_blocks: blocks of a plain ViT that attend over the whole map; default 4.
        classes: default: as in the data; must match the data if given.
        channels: of the pyramid's maps, and of RetinaNet's towers; default 256.
        drop_path: highest drop path rate of the backbone; default 0.2; in [0, 1).
        weights: a safetensors file or a .pth to start from: of a classifier for the backbone, of the
            authors' detector, or of a run; default: none.
        allow_config: let a .pth carry its trainer's configuration, which is dropped; default false.
        pretrained: download timm's weights of the backbone, or read those of a Hugging Face folder;
            default false.
        conventions: "reference" (default) or "torchvision".
        recompute_loss: compute the loss again in the backward; retinanet and semantic_fpn; default
            false.
        grad_checkpointing: of the backbone's blocks; default false.
        frozen_stages: number of the backbone's first stages that are not trained; 1 is the stem, 2
            the stem and the stage of stride 4; default 0.
        freeze_batch_norm: the backbone's batch norms keep their statistics and weights; default
            false.
        sync_batch_norm: of Semantic FPN's head over the GPUs; default false.
    """

    kind: Annotated[str, OneOf((*DETECTORS, SEGMENTER))] = "retinanet"
    backbone: str = "litv2_s"
    window: Annotated[int, NOT_NEGATIVE] = 0
    global_blocks: Annotated[int, NOT_NEGATIVE] = 4
    classes: Annotated[int | None, POSITIVE] = None
    channels: Annotated[int, POSITIVE] = 256
    drop_path: Annotated[float, SHARE] = 0.2
    weights: str | None = None
    allow_config: bool = False
    pretrained: bool = False
    conventions: Annotated[str, OneOf(("reference", "torchvision"))] = "reference"
    recompute_loss: bool = False
    grad_checkpointing: bool = False
    frozen_stages: Annotated[int, NOT_NEGATIVE] = 0
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = False

    @property
    def detects(self) -> bool:
        """True for a detector, false for a segmenter."""
        return self.kind != SEGMENTER


@dataclass(frozen=True)
class DataConfig:
    """The data set, the size of its pictures, and its loader.

    Attributes:
        format: detectors: "coco" (default), "voc", "datasets" or "digits". Segmenters: "ade", "voc",
            "datasets" or "digits". "datasets" is a table of Hugging Face's `datasets` (`tables.py`).
            "digits" are the composed pictures of `composed.py`, of `short_side` x `long_side` pixels,
            written to `path` if it is missing.
        path: the folder of the data set, or a name on a hub for "datasets". COCO: PATH/SPLIT/*.jpg
            and PATH/annotations/instances_SPLIT.json.
        train, val: names of the splits; default: those of the format.
        train_annotations, val_annotations: COCO's files, within `path`; default: see `path`.
        image_key, objects_key, map_key: columns of "datasets"; default "image", "objects" and
            "annotation".
        boxes: of the objects of "datasets", "xywh" (default, as COCO's) or "xyxy".
        train_pictures: number of training pictures, for a dry run without the data, and for
            "digits"; default: counted.
        val_pictures: of "digits"; default 200.
        digits: which digits occur in "digits", such as "0123"; default "0123456789".
        short_side: of a scaled picture in pixels; default 800.
        long_side: largest long side of a scaled picture in pixels; default 1333.
        smallest: shortest side of a detector's training picture in pixels; default 32.
        zero_ignored: value 0 of a map is no class; default: true, for VOC false.
        by_aspect: a detector's micro-batch has wide or high pictures alone; default true.
        workers: loader processes; default 2.
        pin_memory: of the loader; default true.
    """

    format: Annotated[str, OneOf(("coco", "voc", "ade", "datasets", "digits"))] = "coco"
    path: str | None = None
    train: str | None = None
    val: str | None = None
    train_annotations: str | None = None
    val_annotations: str | None = None
    image_key: str = "image"
    objects_key: str = "objects"
    map_key: str = "annotation"
    boxes: Annotated[str, OneOf(("xywh", "xyxy"))] = "xywh"
    train_pictures: Annotated[int | None, POSITIVE] = None
    val_pictures: Annotated[int, POSITIVE] = 200
    digits: str = "0123456789"
    short_side: Annotated[int, POSITIVE] = 800
    long_side: Annotated[int, POSITIVE] = 1333
    smallest: Annotated[int, NOT_NEGATIVE] = 32
    zero_ignored: bool | None = None
    by_aspect: bool = True
    workers: Annotated[int, NOT_NEGATIVE] = 2
    pin_memory: bool = True


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training pictures.

    Attributes:
        scale: range of a random factor (multi-scale) on `data.short_side`; default (1, 1). With a
            crop it scales `data.long_side` too.
        crop: side of a random square crop after scaling, in pixels; default 0: none.
        category_share: a segmenter's crop is drawn again, up to 10 times, if one class has a larger
            share of its pixels; default 0.75.
        flip: probability of a horizontal flip; default 0.5.
        photometric: probability of each of four changes of colour; default 0.
    """

    scale: Annotated[tuple[float, float], Range()] = (1.0, 1.0)
    crop: Annotated[int, NOT_NEGATIVE] = 0
    category_share: Annotated[float, PROBABILITY] = 0.75
    flip: Annotated[float, PROBABILITY] = 0.5
    photometric: Annotated[float, PROBABILITY] = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. Rates are for the global batch as it is.

    Attributes:
        name: "adamw" (default), "adamw8bit", "paged_adamw8bit" or "lion8bit".
        lr: peak rate; default 1e-4.
        betas: of the moments; default (0.9, 0.999).
        eps: default 1e-8.
        weight_decay: default 1e-4.
        decay: "all" (default) decays every parameter, "not_norms" all but those of norms.
        clip: largest norm of the gradient; default 0: none.
        schedule: "steps" (default) multiplies the rate by 0.1 after each milestone. "poly" is
            (lr - min_lr) (1 - t/T)^power + min_lr.
        warmup_steps: optimizer steps of a linear warm-up; default 500.
        warmup_factor: share of the rate at its start; default 0.001.
        milestones: two epochs; default (8, 11).
        min_lr: last rate of "poly"; default 1e-6.
        power: of "poly"; default 0.9.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    lr: Annotated[float, POSITIVE] = 1e-4
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.999)
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    decay: Annotated[str, OneOf(("all", "not_norms"))] = "all"
    clip: Annotated[float, NOT_NEGATIVE] = 0.0
    schedule: Annotated[str, OneOf(("steps", "poly"))] = "steps"
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 500
    warmup_factor: Annotated[float, PROBABILITY] = 1e-3
    milestones: Annotated[tuple[float, float], POSITIVE] = (8, 11)
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    power: Annotated[float, POSITIVE] = 0.9


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run. The defaults of the other fields are those of `RunConfig`.

    Attributes:
        epochs: default 12.
        steps: optimizer steps; default 0: `epochs` decides.
        global_batch: pictures in an optimizer step over all processes; default 16.
        micro_batch: most pictures in a process at once; default 2. Batch norms have its statistics,
            and a detector's losses are normalised by it. accumulation = global_batch /
            (micro_batch * processes).
        log_every: optimizer steps between log lines; default 50.
        save_every: optimizer steps between checkpoints; default 0: at evaluations.
        eval_every: epochs between evaluations; with `steps`, optimizer steps; default 1.
        pictures: validation pictures drawn with predictions after each evaluation; default 8.
        out: folder of the run; default "runs/dense".
    """

    epochs: Annotated[int, POSITIVE] = 12
    steps: Annotated[int, NOT_NEGATIVE] = 0
    global_batch: Annotated[int, POSITIVE] = 16
    micro_batch: Annotated[int, POSITIVE] = 2
    log_every: Annotated[int, POSITIVE] = 50
    eval_every: Annotated[int, POSITIVE] = 1
    pictures: Annotated[int, NOT_NEGATIVE] = 8
    out: str = "runs/dense"


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipes, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        model, data, augment = self.model, self.data, self.augment
        allowed = FORMATS["detection" if model.detects else "segmentation"]
        if data.format not in allowed:
            raise ConfigError(
                f"data.format of {model.kind} must be one of {', '.join(allowed)}, got "
                f"{data.format!r}"
            )
        if model.kind == "mask_rcnn" and data.format == "voc":
            raise ConfigError(
                "data.format=voc has no masks of objects; faster_rcnn and retinanet train on boxes, "
                "mask_rcnn needs coco"
            )
        if data.short_side > data.long_side:
            raise ConfigError(
                f"data.short_side={data.short_side} must be at most data.long_side={data.long_side}"
            )
        if not model.detects and not augment.crop:
            raise ConfigError("augment.crop is missing: the maps of a batch need one size")
        if 0 < augment.crop < 64:
            # A batch norm needs more than one pixel of the map of stride 32.
            raise ConfigError(f"augment.crop must be 0 or at least 64, got {augment.crop}")
        if model.recompute_loss and model.kind not in ("retinanet", SEGMENTER):
            raise ConfigError(f"model.recompute_loss=true does not run model.kind={model.kind}")
        if model.sync_batch_norm and model.detects:
            raise ConfigError(f"model.sync_batch_norm: {model.kind} has no batch norm in its head")
        if self.optim.milestones[0] > self.optim.milestones[1]:
            raise ConfigError(f"optim.milestones must rise, got {list(self.optim.milestones)}")
        if not data.digits or not set(data.digits) <= set("0123456789"):
            raise ConfigError(f"data.digits must be digits such as 0123, got {data.digits!r}")
        if data.format == "digits" and not data.train_pictures:
            raise ConfigError("data.train_pictures is missing: digits are composed")

    def check_files(self) -> None:
        """Raise ConfigError if data or weights are missing, or `train.out` cannot be written."""
        if not self.data.path:
            raise ConfigError("data.path is missing: the folder of the data set")
        if self.data.format not in ("datasets", "digits") and not Path(self.data.path).is_dir():
            raise ConfigError(f"data.path: no such folder {self.data.path}")
        if self.model.weights and not Path(self.model.weights).is_file():
            raise ConfigError(f"model.weights: no such file {self.model.weights}")
        check_out(self.train.out)
        if self.data.format == "digits" and not Path(self.data.path).exists():
            check_out(self.data.path, "data.path")


load, of_dict = Config.load, Config.of_dict
