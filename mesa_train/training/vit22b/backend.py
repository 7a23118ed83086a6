"""Backends of the ViT-22B training: one optimizer step on one process, under FSDP2 or ZeRO-3.

A backend holds the model, the optimizer and the process group. The loop (`loop.py`) is the same for
all backends. `FSDP2Backend` is plain PyTorch, sharded (with or without tensor parallelism) or not.
`ZeRO3Backend` is DeepSpeed through Accelerate; the launcher's configuration sets its offloading.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.policy import Policy
from mesa_train.training.optim.sharded_adamw8bit import LocalShards

from . import checkpoint as checkpoints
from .averaging import AveragedWeights
from .config import Config, ConfigError
from .schedule import groups

# Communication backend of torch.distributed, by device.
_COMMUNICATION = {"cpu": "gloo", "cuda": "nccl"}


class Backend(Protocol):
    """Model and optimizer of one run.

    Attributes:
        model: the model, wrapped by mesa_train unless the policy is "plain".
        device: of this process.
        data_rank: this process's part of the images, from 0.
        data_ranks: number of parts.
        rank: of this process.
        average: averaged weights; None without `train.ema`.
    """

    average: AveragedWeights | None
    model: nn.Module
    device: torch.device
    data_rank: int
    data_ranks: int
    rank: int

    def forward(self, images: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float: ...

    def save(self, folder: Path, state: dict[str, Any]) -> Path: ...

    def load(self, checkpoint: Path) -> dict[str, Any]: ...

    def close(self) -> None: ...


def backend_name(config: Config, world: int) -> str:
    """The backend of a launch with `world` processes: "single", "fsdp2" or "zero3".

    Raises:
        ConfigError: configuration and launcher do not match.
    """
    backend = config.train.backend
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if backend == "auto":
        backend = "zero3" if deepspeed else "fsdp2" if world > 1 else "single"
    if backend == "zero3" and not deepspeed:
        raise ConfigError(
            "train.backend=zero3 needs a DeepSpeed launch: "
            "accelerate launch --config_file recipes/vit22b/accelerate/zero3.yaml ..."
        )
    if backend == "single" and world > 1:
        raise ConfigError(f"train.backend=single, but {world} processes were started")
    if config.train.tensor_parallel > 1 and (backend != "fsdp2" or world == 1):
        raise ConfigError(
            f"train.tensor_parallel={config.train.tensor_parallel} needs the backend fsdp2 and as "
            f"many processes; this is {backend} with {world}"
        )
    return backend


def build(config: Config, classes: int, device: str) -> Any:
    """Build the model on `device`. On "meta", no weight is initialised."""
    import timm

    import mesa_train.models  # noqa: F401  registers them with timm

    model, dtype = config.model, torch.get_default_dtype()
    if config.train.precision == "pure_bf16":
        dtype = torch.bfloat16
    with torch.device(device):
        built = timm.create_model(
            model.name,
            img_size=model.image_size,
            num_classes=classes,
            qk_norm=model.qk_norm,
            gelu=model.gelu,
            pool_bias=model.pool_bias,
            drop_path_rate=model.drop_path,
            dtype=dtype,
        )
    built.set_grad_checkpointing(config.train.checkpointing != "none")
    return built.train()


def check_precision(precision: str) -> None:
    """Raise ConfigError for bfloat16 on a GPU without bfloat16 (before Ampere)."""
    if precision != "no" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"train.precision={precision}: {name} has no bfloat16 arithmetic; set train.precision=no"
        )


def load_weights(config: Config, model: Any) -> None:
    """Load the initial weights of a configuration."""
    assert config.model.weights
    checkpoints.load_export(Path(config.model.weights), model, config.model.fresh_head)


def install(model: Any, policy: str, checkpointing: str = "none") -> Any:
    """Wrap the model by mesa_train, unless the policy is "plain"."""
    if policy == "plain":
        return model
    chosen = Policy.preset(policy)
    if checkpointing == "coded":
        chosen = dataclasses.replace(chosen, checkpoint_inputs=8)
    return mesa_train.wrap(model, chosen)


def average_of(config: Config, model: nn.Module) -> AveragedWeights | None:
    """The averaged weights of a configuration, from the model's first weights; None without."""
    return AveragedWeights(model, config.train.ema) if config.train.ema else None


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW, SGD, or bitsandbytes' AdamW with 8-bit moments, over the parameter groups.

    Raises:
        ConfigError: bitsandbytes is needed and missing.
    """
    optim = config.optim
    parameters = groups(model, optim.weight_decay, optim.head_decay)
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas)
    if optim.name == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum)
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            f"optim.name={optim.name} needs: pip install 'mesa_train[bitsandbytes]'"
        ) from None

    def make(given: list[dict[str, Any]]) -> Any:
        return bitsandbytes.optim.AdamW8bit(given, lr=optim.lr, betas=optim.betas)

    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return LocalShards(parameters, make)
    made = make(parameters)
    # ZeRO-3 flattens the parameters before a step. The flat tensor of norms and biases is so large
    # that bitsandbytes would use 8 bits; 32 bits are set for it here.
    small = [g["name"] for g in parameters].index("no_decay")
    made.mng.index2config[small, 0] = {"optim_bits": 32}
    return made
