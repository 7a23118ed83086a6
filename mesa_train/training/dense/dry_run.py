"""Dry run of a dense recipe: batches, steps, parameter groups and memory at the worst shape.

Not counted: the workspace of kernels, the losses' temporary arrays, unused memory of the allocator
and the CUDA context.
"""

from __future__ import annotations

import dataclasses

import torch

from mesa_train.training.classification import optimizers as classification
from mesa_train.training.config_schema import ConfigError
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.precision import Choice, choose

from . import memory, optimizers
from .build import model_of
from .config import Config
from .tasks import task_of


def use_cpu(config: Config) -> bool:
    """True if the run uses no GPU, by its configuration or because there is none."""
    return config.train.device == "cpu" or not torch.cuda.is_available()


def precision(config: Config) -> Choice:
    """The precision of a configuration on this machine."""
    return choose(config.train.precision, "cpu" if use_cpu(config) else "cuda")


def check_machine(config: Config) -> None:
    """Raise ConfigError for a setting that this machine or its packages do not support."""
    on_cpu = use_cpu(config)
    if on_cpu and config.train.precision == "fp16":
        raise ConfigError(
            "train.precision=fp16 needs a GPU; auto, bf16 and no work on a CPU as well"
        )
    if on_cpu and config.model.sync_batch_norm:
        raise ConfigError("model.sync_batch_norm: PyTorch synchronises batch norms on GPUs only")
    classification.check(config.optim.name, "cpu" if on_cpu else "cuda")


def shared(config: Config, world: int) -> Config:
    """The configuration for `world` processes: a micro-batch is at most a process's part.

    Raises:
        ConfigError: the global batch cannot be shared; the message names a micro-batch that fits.
    """
    train = config.train
    part, rest = divmod(train.global_batch, world)
    if rest or not part:
        raise ConfigError(
            f"train.global_batch={train.global_batch} cannot be shared by {_processes(world)}"
        )
    micro = min(train.micro_batch, part)
    if part % micro:
        fit = max(m for m in range(1, micro + 1) if part % m == 0)
        raise ConfigError(
            f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={micro} "
            f"on {_processes(world)}; {fit} would fit"
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, micro_batch=micro))


def batches(config: Config, world: int) -> str:
    """Text that describes the parts of a global batch."""
    train = config.train
    times = train.global_batch // (train.micro_batch * world)
    return (
        f"batch {train.global_batch} = {train.micro_batch} x {times} accumulated x "
        f"{_processes(world)}"
    )


def _processes(world: int) -> str:
    return "1 process" if world == 1 else f"{world} processes"


def report(config: Config, world: int) -> str:
    """The text of the dry run.

    The data is opened only if the configuration lacks classes or the number of pictures.
    """
    config = shared(config, world)
    # Weights change no number, and need no download here.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))
    classes, pictures = config.model.classes, config.data.train_pictures
    if classes is None or pictures is None:
        config.check_files()
        task = task_of(config)
        classes, pictures = len(task.names), len(task.groups)
    train, model = config.train, model_of(config, classes)
    epoch = pictures / train.global_batch
    per_epoch = -int(-epoch // 1) if config.model.detects else int(epoch)
    steps = train.steps or train.epochs * per_epoch
    height, width = memory.worst_shape(config)
    lines = [
        f"{config.model.kind} on {config.model.backbone}, {pictures} pictures, {classes} classes",
        batches(config, world),
        f"{steps} steps, {per_epoch} in an epoch",
        f"policy {train.policy}, optimizer {config.optim.name}",
        precision(config).line,
    ]
    for group in optimizers.groups(model, config.optim):
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"group {group['name']:<8} {len(group['params']):>4} tensors {count:>12,} values  "
            f"lr {group['lr']:.3g}  decay {group['weight_decay']:g}"
        )
    dtype = precision(config).dtype
    sizes = memory.memory(config, classes, dtype)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    shape = f"{train.micro_batch} x {height} x {width}"
    lines.append(f"predicted memory at {shape}: {format_bytes(sum(sizes.values()))}: {parts}")
    if train.policy != "plain":
        plain = dataclasses.replace(config, train=dataclasses.replace(train, policy="plain"))
        total = sum(memory.memory(plain, classes, dtype).values())
        lines.append(f"plain would need {format_bytes(total)}")
    return "\n".join(lines)
