"""Configuration of a recipe: a strict schema, read from YAML, changed by `section.key=value`.

A mistake gives one line with the key, the value and the choices, before any data or model is
loaded. The defaults are LITv2's official ImageNet recipe for S.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesa_train.training.config_schema import ConfigError as ConfigError
from mesa_train.training.config_schema import of_values, one_of, positive, read_yaml
from mesa_train.training.data.config import AugmentConfig, DataConfig, check_data, check_path

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit")
PRECISIONS = ("no", "bf16", "fp16", "auto")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its initial weights.

    Attributes:
        name: a timm model, LITv2's included; default "litv2_s".
        classes: default: as in the data; must match the data if given.
        drop_path: highest drop path rate; default 0.2; in [0, 1).
        weights: a safetensors file or the authors' .pth to start from; default: none. A head of
            other classes is not loaded.
        allow_config: let a .pth carry its trainer's configuration, which is dropped; default false.
        sync_batch_norm: synchronise batch norms over the processes; default false; GPUs only.
        grad_checkpointing: turn on timm's activation checkpointing; default false.
        early_stages_without_attention: first stages that lose their attention, for timm's Swin and
            PVT v2 models; default 0.
    """

    name: str = "litv2_s"
    classes: int | None = None
    drop_path: float = 0.2
    weights: str | None = None
    allow_config: bool = False
    sync_batch_norm: bool = False
    grad_checkpointing: bool = False
    early_stages_without_attention: int = 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Rates are for a global batch of `lr_batch` images and scale linearly with the batch.

    Attributes:
        name: "adamw" (default), "adamw8bit", "paged_adamw8bit" or "lion8bit".
        lr: peak rate; default 5e-4; above 0.
        warmup_lr: rate at the first step; default 5e-7; at least 0.
        min_lr: rate at the last step; default 5e-6; at least 0.
        lr_batch: global batch of the rates; default 512; 0: the rates are not scaled.
        betas: of the moments; default (0.9, 0.999); each in [0, 1).
        eps: default 1e-8; at least 0.
        weight_decay: default 0.05; at least 0.
        warmup_epochs: default 20; fewer than `train.epochs`.
        clip: largest norm of the gradient; default 5.0; above 0.
        offset_scale: factor on the rate of the offset convolutions' weights; default 0.01; at least
            0.
        offset_floor: lowest rate of the offset convolutions. "shared" (default) is the official
            one: the floor of all groups, so that the offsets' rate hardly decays. "scaled": the
            floor is scaled like the peak.
    """

    name: str = "adamw"
    lr: float = 5e-4
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6
    lr_batch: int = 512
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_epochs: float = 20
    clip: float = 5.0
    offset_scale: float = 0.01
    offset_floor: str = "shared"


@dataclass(frozen=True)
class TrainConfig:
    """One run: batches, precision, policy, checkpoints.

    Attributes:
        epochs: default 300; at least 1.
        global_batch: images in an optimizer step over all processes; default 1024.
        micro_batch: most images in a process at once; default 128; even with mixup. accumulation =
            global_batch / (micro_batch * processes).
        precision: "no", "bf16", "fp16" or "auto" (default). "auto": bf16 if the device has it, else
            float32 on a CPU, fp16 on a GPU (`precision.py`).
        policy: "plain" or a mesa_train preset, with or without "+offload"; default "mesa8".
        seed: default 0; at least 0.
        ema: decay of the averaged weights, reached gradually; default 0: none; in [0, 1). With it,
            `best` holds the averaged weights.
        log_every: optimizer steps between log lines; default 10.
        save_every: optimizer steps between checkpoints; default 0: once an epoch.
        keep: how many of the newest checkpoints stay; default 2.
        tracker: "tensorboard" (default), "wandb" or "none".
        device: "auto" (default) uses GPUs if there are any; "cpu" does not.
        out: folder of the run; default "runs/litv2".
    """

    epochs: int = 300
    global_batch: int = 1024
    micro_batch: int = 128
    precision: str = "auto"
    policy: str = "mesa8"
    seed: int = 0
    ema: float = 0.0
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    tracker: str = "tensorboard"
    device: str = "auto"
    out: str = "runs/litv2"


@dataclass(frozen=True)
class Config:
    """Configuration of a recipe, one section for each topic.

    Attributes:
        model: the model and its initial weights.
        data: the data set and its loader.
        augment: augmentation of training images.
        optim: the optimizer and its schedule.
        train: batches, precision, policy, checkpoints.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the YAML."""
        return dataclasses.asdict(self)


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` changes and check every value.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    return of_dict(read_yaml(path, changes))


def of_dict(values: Mapping[str, Any]) -> Config:
    """Build and check a Config from nested plain values.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    config: Config = of_values(Config, values)
    _check(config)
    return config


def _check(config: Config) -> None:
    """Check every value and the values that depend on each other. Raises ConfigError."""
    from mesa_train.policy import OFFLOADED, PRESETS

    data, optim, train, augment = config.data, config.optim, config.train, config.augment
    check_data(data)
    one_of("optim.name", optim.name, OPTIMIZERS)
    one_of("optim.offset_floor", optim.offset_floor, ("shared", "scaled"))
    one_of("train.precision", train.precision, PRECISIONS)
    one_of("train.policy", train.policy, ("plain", *PRESETS, *OFFLOADED))
    one_of("train.tracker", train.tracker, ("tensorboard", "wandb", "none"))
    one_of("train.device", train.device, ("auto", "cpu"))
    for name, value in (
        ("data.image_size", data.image_size),
        ("optim.lr", optim.lr),
        ("optim.clip", optim.clip),
        ("train.epochs", train.epochs),
        ("train.global_batch", train.global_batch),
        ("train.micro_batch", train.micro_batch),
        ("train.log_every", train.log_every),
        ("train.keep", train.keep),
    ):
        positive(name, value)
    for name, share in (
        ("augment.label_smoothing", augment.label_smoothing),
        ("augment.erase", augment.erase),
        ("model.drop_path", config.model.drop_path),
        ("train.ema", train.ema),
    ):
        if not 0 <= share < 1:
            raise ConfigError(f"{name} must lie in [0, 1), got {share}")
    _check_ranges(config)
    if optim.warmup_epochs >= train.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} must be fewer than "
            f"train.epochs={train.epochs}"
        )
    if augment.mixup + augment.cutmix > 0 and train.micro_batch % 2:
        raise ConfigError(f"train.micro_batch={train.micro_batch} must be even for mixup")


def _check_ranges(config: Config) -> None:
    """Raise ConfigError for a forbidden negative number, or for a pair that is no range."""
    augment, optim, train = config.augment, config.optim, config.train
    for name, value in (
        ("augment.color_jitter", augment.color_jitter),
        ("augment.mixup", augment.mixup),
        ("augment.cutmix", augment.cutmix),
        ("optim.warmup_lr", optim.warmup_lr),
        ("optim.min_lr", optim.min_lr),
        ("optim.lr_batch", optim.lr_batch),
        ("optim.eps", optim.eps),
        ("optim.weight_decay", optim.weight_decay),
        ("optim.warmup_epochs", optim.warmup_epochs),
        ("optim.offset_scale", optim.offset_scale),
        ("train.seed", train.seed),
        ("train.save_every", train.save_every),
    ):
        if not value >= 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
    for name, (low, high), most in (
        ("augment.scale", augment.scale, 1.0),
        ("augment.ratio", augment.ratio, math.inf),
    ):
        if not 0 < low <= high <= most:
            raise ConfigError(f"{name} must be a range within 0 and {most}, got [{low}, {high}]")
    if not 0 <= augment.hflip <= 1:
        raise ConfigError(f"augment.hflip must lie in [0, 1], got {augment.hflip}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas must lie in [0, 1), got {list(optim.betas)}")


def check_files(config: Config) -> None:
    """Check that the folders and files of a configuration exist and that `train.out` is writable.

    Raises:
        ConfigError: names the key and the path.
    """
    weights = config.model.weights
    check_path(config.data)
    if weights and not Path(weights).is_file():
        raise ConfigError(f"model.weights: no such file {weights}")
    out = Path(config.train.out).absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"train.out: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"train.out: {there} may not be written to")
