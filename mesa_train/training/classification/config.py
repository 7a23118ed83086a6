"""Configuration of a recipe: a strict schema, read from YAML, changed by `section.key=value`.

A mistake gives one line with the key, the value and the choices, before any data or model is
loaded. The defaults are LITv2's official ImageNet recipe for S.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mesa_train.methods.apply import PLAIN
from mesa_train.policy import Policy
from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Configuration,
    OneOf,
)
from mesa_train.training.config_schema import ConfigError as ConfigError
from mesa_train.training.data.config import AugmentConfig, DataConfig, check_path
from mesa_train.training.distill.config import DistillConfig
from mesa_train.training.recipe_config import RunConfig, check_out, check_schedule

from .method_config import METHODS as METHODS
from .method_config import MethodConfig

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "sgd")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its initial weights.

    Attributes:
        name: a timm model, LITv2's included; default "litv2_s".
        classes: default: as in the data; must match the data if given.
        drop_path: highest drop path rate; default 0.2; in [0, 1).
        weights: a safetensors file or the authors' .pth to start from; default: none. A head of
            other classes is not loaded. For method.name=linear and finetune: the file of a run of
            recipes/mocov3, or the authors' .pth.tar.
        allow_config: let a .pth carry its trainer's configuration, which is dropped; default false.
        sync_batch_norm: synchronise batch norms over the processes; default false; GPUs only.
        grad_checkpointing: turn on timm's activation checkpointing; default false.
        early_stages_without_attention: first stages that lose their attention, for timm's Swin and
            PVT v2 models; default 0.
    """

    name: str = "litv2_s"
    classes: Annotated[int | None, POSITIVE] = None
    drop_path: Annotated[float, SHARE] = 0.2
    weights: str | None = None
    allow_config: bool = False
    sync_batch_norm: bool = False
    grad_checkpointing: bool = False
    early_stages_without_attention: Annotated[int, NOT_NEGATIVE] = 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Rates are for a global batch of `lr_batch` images and scale linearly with the batch.

    Attributes:
        name: "adamw" (default), "adamw8bit", "paged_adamw8bit", "lion8bit" or "sgd".
        lr: peak rate; default 5e-4; above 0.
        warmup_lr: rate at the first step; default 5e-7; at least 0.
        min_lr: rate at the last step; default 5e-6; at least 0.
        lr_batch: global batch of the rates; default 512; 0: the rates are not scaled.
        rate_per: "step" (default): the rate changes in each step. "epoch": all steps of an epoch
            have the rate of its first step.
        betas: of the moments; default (0.9, 0.999); each in [0, 1). sgd does not use it.
        momentum: of sgd; default 0.9; in [0, 1). The other optimizers do not use it.
        eps: default 1e-8; at least 0.
        weight_decay: default 0.05; at least 0.
        warmup_epochs: default 20; fewer than `train.epochs`.
        clip: largest norm of the gradient; default 5.0; 0: no clipping.
        offset_scale: factor on the rate of the offset convolutions' weights; default 0.01; at least
            0.
        offset_floor: lowest rate of the offset convolutions. "shared" (default) is the official
            one: the floor of all groups, so that the offsets' rate hardly decays. "scaled": the
            floor is scaled like the peak.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    lr: Annotated[float, POSITIVE] = 5e-4
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 5e-7
    min_lr: Annotated[float, NOT_NEGATIVE] = 5e-6
    lr_batch: Annotated[int, NOT_NEGATIVE] = 512
    rate_per: Annotated[str, OneOf(("step", "epoch"))] = "step"
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.999)
    momentum: Annotated[float, SHARE] = 0.9
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 20
    clip: Annotated[float, NOT_NEGATIVE] = 5.0
    offset_scale: Annotated[float, NOT_NEGATIVE] = 0.01
    offset_floor: Annotated[str, OneOf(("shared", "scaled"))] = "shared"


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run. The defaults of the other fields are those of `RunConfig`.

    Attributes:
        epochs: default 300; at least 1.
        global_batch: images in an optimizer step over all processes; default 1024.
        micro_batch: most images in a process at once; default 128; even with mixup. accumulation =
            global_batch / (micro_batch * processes).
        ema: decay of the averaged weights, reached gradually; default 0: none; in [0, 1). With it,
            `best` holds the averaged weights.
        cuda_graph: run each step as CUDA graphs (`mesa_train.capture_step`), for small models on a
            fast GPU; default false; one process on a GPU.
        tracker: "tensorboard" (default), "wandb" or "none".
        out: folder of the run; default "runs/litv2".
    """

    epochs: Annotated[int, POSITIVE] = 300
    global_batch: Annotated[int, POSITIVE] = 1024
    micro_batch: Annotated[int, POSITIVE] = 128
    ema: Annotated[float, SHARE] = 0.0
    cuda_graph: bool = False
    tracker: Annotated[str, OneOf(("tensorboard", "wandb", "none"))] = "tensorboard"
    out: str = "runs/litv2"


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of a recipe, one section for each topic.

    Attributes:
        model: the model and its initial weights.
        data: the data set and its loader.
        augment: augmentation of training images.
        optim: the optimizer and its schedule.
        train: batches, precision, policy, checkpoints.
        method: of the efficient ViTs, or distillation; default: none.
        distill: the teacher of `method.name=distill`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        train, augment = self.train, self.augment
        check_schedule(self)
        if augment.mixup + augment.cutmix > 0 and train.micro_batch % 2:
            raise ConfigError(f"train.micro_batch={train.micro_batch} must be even for mixup")
        if self.method.name == "distill":
            self._check_distill()
        if train.cuda_graph and self.method.name != "none":
            raise ConfigError(f"train.cuda_graph=true does not run method.name={self.method.name}")
        if train.cuda_graph and train.policy != PLAIN:
            policy = Policy.preset(train.policy)
            if policy.offload or policy.ranges == "running":
                raise ConfigError(
                    f"train.cuda_graph=true cannot capture train.policy={train.policy}, which works "
                    "on the host in every step; mesa8 and mesa4 can be captured"
                )

    def _check_distill(self) -> None:
        """Raise ConfigError for values that do not fit a distillation."""
        distill, augment = self.distill, self.augment
        if not distill.teacher:
            raise ConfigError("distill.teacher is missing: a timm model or a transformers folder")
        if augment.cutmix:
            raise ConfigError(
                f"augment.cutmix={augment.cutmix:g}: a distillation mixes whole images; set "
                "augment.cutmix=0 and use augment.mixup"
            )
        if distill.draws and distill.top and distill.loss == "sigmoid":
            raise ConfigError(
                f"distill.top={distill.top} keeps a softmax; distill.loss=sigmoid needs distill.top=0"
            )


load, of_dict = Config.load, Config.of_dict


def check_files(config: Config) -> None:
    """Check that the folders and files of a configuration exist and that `train.out` is writable.

    Raises:
        ConfigError: names the key and the path.
    """
    weights = config.model.weights
    check_path(config.data)
    if weights and not Path(weights).is_file():
        raise ConfigError(f"model.weights: no such file {weights}")
    check_out(config.train.out)
