"""A recipe's configuration: a strict schema, read from YAML, changed by `section.key=value`.

Whatever is wrong is one line naming the key, the value and the choices, said before any data or
model is loaded. The defaults are LITv2's official ImageNet recipe for S.
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
    """`weights` is a safetensors file, or the authors' .pth, to start from; a head of other classes
    stays behind. `allow_config` lets a .pth carry its trainer's configuration, which is dropped.
    `classes` must match the data if given. `early_stages_without_attention` is for
    timm's Swin and PVT v2 models."""

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
    """Rates are for a global batch of `lr_batch` and scale linearly with it; 0 leaves them alone.

    offset_scale multiplies the rate of the offset convolutions' weights. Their floor is the
    official one with offset_floor="shared" (every group's, so that they hardly decay) and scaled
    like their peak with "scaled".
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
    """One run. micro_batch is the most images a process takes at once; with the processes it says
    how many are accumulated to global_batch.

    precision: "auto" is bf16 where the device has it, else float32 on a CPU, fp16 on a GPU (`precision.py`).
    policy: "plain" or a mesa_train preset, "+offload" behind it or not. save_every: optimizer steps
        between checkpoints, 0 for once an epoch. ema: decay of the averaged weights, reached gradually,
        0 for none; `best` is then of these. device: "auto" takes GPUs where there are any, "cpu" leaves
        them alone. out: the run's own folder.
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
    """A recipe: one section for each concern."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in the YAML."""
        return dataclasses.asdict(self)


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` changes, check everything. Raises ConfigError."""
    return of_dict(read_yaml(path, changes))


def of_dict(values: Mapping[str, Any]) -> Config:
    """A checked Config of nested plain values. Raises ConfigError."""
    config: Config = of_values(Config, values)
    _check(config)
    return config


def _check(config: Config) -> None:
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
    """ConfigError for a negative number where there is none, or a pair of no range."""
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
    """ConfigError for a folder or file that is not there."""
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
