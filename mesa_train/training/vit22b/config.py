"""Configuration of the ViT-22B recipes: a strict schema, read from YAML.

Values are changed by `section.key=value`.

A mistake gives one line with the key, the value and the choices, before any model is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mesa_train.models.vit22b.layers import GELUS, QK_NORMS
from mesa_train.models.vit22b.model import SIZES
from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POLICY,
    POSITIVE,
    PROBABILITY,
    SHARE,
    Configuration,
    OneOf,
    Range,
    of_values,
    read_yaml,
)
from mesa_train.training.config_schema import ConfigError as ConfigError
from mesa_train.training.data.config import DataConfig, check_path

if TYPE_CHECKING:
    from mesa_train.utils.precision import Choice

BACKENDS = ("auto", "single", "fsdp2", "zero3")
PRECISIONS = ("no", "bf16", "pure_bf16", "auto")
CHECKPOINTING = ("none", "block", "coded")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
SCHEDULES = ("rsqrt", "cosine")
LOSSES = ("sigmoid", "softmax")


def _without_scaling(name: str, value: str) -> None:
    """Raise ConfigError for float16, which needs loss scaling."""
    if value == "fp16":
        raise ConfigError(
            f"{name}=fp16 needs loss scaling, which these recipes do without, as ViT-22B did in "
            f"bfloat16; take one of {', '.join(PRECISIONS)}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """A model of mesa_train.models.vit22b and its initial weights.

    Attributes:
        name: a model of `SIZES`; default "vit_22b_tiny".
        image_size: in pixels; default 224; a multiple of the patch.
        classes: default: as in the data; must match the data if given. A stream needs it.
        qk_norm: norm of queries and keys: "rms" (default), "layer" or "none".
        gelu: "tanh" (default) or "none", the exact form.
        pool_bias: biases of the pooling head's queries, keys and values; default true.
        drop_path: highest drop path rate; default 0.
        head_bias: initial bias of the classifier; default -10.
        weights: safetensors file or folder to start from; default: none.
        fresh_head: do not load the classifier from `weights`; default false.
    """

    name: Annotated[str, OneOf(SIZES)] = "vit_22b_tiny"
    image_size: Annotated[int, POSITIVE] = 224
    classes: Annotated[int | None, POSITIVE] = None
    qk_norm: Annotated[str, OneOf(QK_NORMS)] = "rms"
    gelu: Annotated[str, OneOf(GELUS)] = "tanh"
    pool_bias: bool = True
    drop_path: Annotated[float, SHARE] = 0.0
    head_bias: float = -10.0
    weights: str | None = None
    fresh_head: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are the paper's, except the length of the run.

    Attributes:
        name: "adamw" (default), "adamw8bit" or "sgd". ZeRO-3 does not run "sgd".
        schedule: "rsqrt" (default): the reciprocal square root. "cosine": half a cosine to 0, as in
            fine-tuning.
        lr: peak rate; default 1e-3; above 0.
        warmup: steps of linear warm-up; default 10,000.
        cooldown: steps of rsqrt's linear cool-down; default 30,000. warmup + cooldown <=
            `train.steps`. cosine does not use it, and needs warmup < `train.steps`.
        timescale: steps of the reciprocal square root; default 10,000; above 0.
        betas: default (0.9, 0.999). sgd does not use it.
        momentum: of sgd; default 0.9; in [0, 1). AdamW does not use it.
        weight_decay: of matrices; default 0.03.
        head_decay: of the classifier's weight; default 3.0.
        clip: largest norm of the gradient; default 1.0; above 0.
        loss: cross-entropy of "sigmoid" (default), summed over classes, or of "softmax".
        z_loss: weight of the z-loss; default 0. The softmax has none.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    schedule: Annotated[str, OneOf(SCHEDULES)] = "rsqrt"
    lr: Annotated[float, POSITIVE] = 1e-3
    warmup: Annotated[int, NOT_NEGATIVE] = 10_000
    cooldown: Annotated[int, NOT_NEGATIVE] = 30_000
    timescale: Annotated[int, POSITIVE] = 10_000
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.999)
    momentum: Annotated[float, SHARE] = 0.9
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.03
    head_decay: Annotated[float, NOT_NEGATIVE] = 3.0
    clip: Annotated[float, POSITIVE] = 1.0
    loss: Annotated[str, OneOf(LOSSES)] = "sigmoid"
    z_loss: Annotated[float, NOT_NEGATIVE] = 0.0


@dataclass(frozen=True)
class CropConfig:
    """The paper's augmentation: random crops and horizontal flips.

    Attributes:
        scale: range of the crop's area; default (0.05, 1.0); within (0, 1].
        ratio: range of the crop's aspect ratio; default (3/4, 4/3).
        hflip: probability of a flip; default 0.5; in [0, 1].
    """

    scale: Annotated[tuple[float, float], Range(1.0)] = (0.05, 1.0)
    ratio: Annotated[tuple[float, float], Range()] = (3 / 4, 4 / 3)
    hflip: Annotated[float, PROBABILITY] = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """One run: processes, precision, memory, batches, checkpoints.

    A data-parallel rank accumulates global_batch / (micro_batch * data-parallel ranks)
    micro-batches.

    Attributes:
        backend: "auto" (default), "single", "fsdp2" or "zero3". "auto": zero3 under a DeepSpeed
            launch, fsdp2 with several processes, else single.
        tensor_parallel: ranks that share the heads; default 1; must divide the heads.
        sequence_parallel: shard the tokens too over the tensor-parallel ranks; default false.
        async_tensor_parallel: overlap the transfer of tokens with the matmuls; default false. Needs
            CUDA devices with peer access; compiles the blocks.
        reshard: FSDP2 frees gathered weights after a block's forward; default true.
        offload: keep FSDP2's shards in CPU memory; default false.
        nvme_path: folder that replaces the one in DeepSpeed's configuration, if that offloads to
            NVMe.
        precision: "no", "bf16", "pure_bf16" or "auto" (default). "bf16": float32 weights, bfloat16
            arithmetic. "pure_bf16": bfloat16 weights, which lose small updates
            (recipes/vit22b/README.md). "auto": bf16 if the device supports it, else "no"
            (`precision.py`).
        policy: "plain" or a preset of mesa_train; default "mesa8".
        checkpointing: "none" (default), "block" or "coded". "block" saves each block's input,
            "coded" the input's 8-bit codes. Both run the block again in the backward, with the
            stashes of one block at a time.
        global_batch: images in an optimizer step over all processes; default 64; above 0.
        micro_batch: images of a rank at once; default 64; above 0.
        steps: optimizer steps of the run; default 100; above 0.
        seed: default 0.
        ema: decay of the averaged weights, reached gradually; default 0: none; in [0, 1). They are
            in the checkpoints and in `OUT/weights_averaged`.
        save_every: optimizer steps between checkpoints; default 0: no checkpoint.
        resume: a checkpoint's folder, or "last" for the newest in `out`; default: none.
        watch_every: steps between measurements of the attention; default 0: never.
        peak_tflops: peak of the device in 1e12 operations a second, for the MFU; default 0: by the
            device's name.
        out: folder of the run; default "runs/vit22b".
    """

    backend: Annotated[str, OneOf(BACKENDS)] = "auto"
    tensor_parallel: Annotated[int, POSITIVE] = 1
    sequence_parallel: bool = False
    async_tensor_parallel: bool = False
    reshard: bool = True
    offload: bool = False
    nvme_path: str | None = None
    precision: Annotated[str, _without_scaling, OneOf(PRECISIONS)] = "auto"
    policy: Annotated[str, POLICY] = "mesa8"
    checkpointing: Annotated[str, OneOf(CHECKPOINTING)] = "none"
    global_batch: Annotated[int, POSITIVE] = 64
    micro_batch: Annotated[int, POSITIVE] = 64
    steps: Annotated[int, POSITIVE] = 100
    seed: Annotated[int, NOT_NEGATIVE] = 0
    ema: Annotated[float, SHARE] = 0.0
    save_every: Annotated[int, NOT_NEGATIVE] = 0
    resume: str | None = None
    watch_every: Annotated[int, NOT_NEGATIVE] = 0
    peak_tflops: Annotated[float, NOT_NEGATIVE] = 0.0
    out: str = "runs/vit22b"


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of a recipe, one section for each topic.

    Attributes:
        model: the model and its initial weights.
        data: the data set and its loader.
        augment: augmentation of training images.
        optim: the optimizer and its schedule.
        train: processes, precision, memory, batches, checkpoints.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise ConfigError for values of several fields that do not fit together."""
        model, optim, train = self.model, self.optim, self.train
        if train.checkpointing == "coded" and train.policy == "plain":
            raise ConfigError("train.checkpointing=coded needs a train.policy other than plain")
        patch, _, _, heads = SIZES[model.name]
        if model.image_size % patch:
            raise ConfigError(
                f"model.image_size must be a multiple of the patch, {patch}; got {model.image_size}"
            )
        if optim.loss == "softmax" and optim.z_loss:
            raise ConfigError(f"optim.z_loss={optim.z_loss:g} needs optim.loss=sigmoid")
        if optim.schedule == "cosine":
            if optim.warmup >= train.steps:
                raise ConfigError(
                    f"optim.warmup={optim.warmup} must be fewer than train.steps={train.steps}"
                )
        elif optim.warmup + optim.cooldown > train.steps:
            raise ConfigError(
                f"optim.warmup={optim.warmup} and optim.cooldown={optim.cooldown} exceed "
                f"train.steps={train.steps}"
            )
        if heads % train.tensor_parallel:
            raise ConfigError(
                f"train.tensor_parallel={train.tensor_parallel} must divide the {heads} heads of "
                f"{model.name}"
            )
        if train.async_tensor_parallel and not train.sequence_parallel:
            raise ConfigError("train.async_tensor_parallel needs train.sequence_parallel=true")
        if not train.sequence_parallel:
            return
        if train.tensor_parallel == 1:
            raise ConfigError("train.sequence_parallel needs a train.tensor_parallel above 1")
        tokens = (model.image_size // patch) ** 2
        if tokens % train.tensor_parallel:
            raise ConfigError(
                f"train.sequence_parallel: train.tensor_parallel={train.tensor_parallel} must divide "
                f"the {tokens} tokens of {model.image_size} px"
            )


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` changes and check every value.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    values = read_yaml(path, changes)
    data = values.get("data")
    if isinstance(data, Mapping) and "image_size" in data:
        raise ConfigError("data.image_size is model.image_size in these recipes; set that")
    config: Config = of_values(Config, values)
    check_path(config.data)
    sized = dataclasses.replace(config.data, image_size=config.model.image_size)
    return dataclasses.replace(config, data=sized)


def accumulation(train: TrainConfig, ranks: int) -> int:
    """Micro-batches that a data-parallel rank accumulates.

    Raises:
        ConfigError: the global batch is not divisible.
    """
    if train.global_batch % (train.micro_batch * ranks):
        raise ConfigError(
            f"train.global_batch={train.global_batch} is no multiple of "
            f"train.micro_batch={train.micro_batch} on {ranks} data-parallel ranks"
        )
    return train.global_batch // (train.micro_batch * ranks)


def precision_of(config: Config) -> Choice:
    """The precision of a configuration on this machine.

    These recipes do not scale the loss, so a GPU without bfloat16 computes in float32.
    """
    import torch

    from mesa_train.utils.precision import choose

    asked, kind = config.train.precision, "cuda" if torch.cuda.is_available() else "cpu"
    found = choose(asked.removeprefix("pure_"), kind, fp16=False)
    if asked.startswith("pure_"):
        return dataclasses.replace(found, name=asked, line=found.line.replace("bf16", asked, 1))
    return found
