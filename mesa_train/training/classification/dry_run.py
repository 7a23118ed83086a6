"""Dry run of a recipe: its batches, steps, parameter groups and memory on a device.

Memory is counted on the meta device. The bytes of the tensors saved for the backward (under bf16
autocast too) are exact. Weights, gradients and optimizer states are counted by their sizes.

Not counted: the workspace of kernels, unused memory of the allocator and the CUDA context, together
about 1 to 2 GiB.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.training.config_schema import ConfigError
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.precision import Choice, choose

from . import optimizers
from .config import Config
from .methods import method_of


@dataclass(frozen=True)
class Plan:
    """Batches and steps of a run.

    Attributes:
        world: number of processes.
        accumulation: micro-batches in an optimizer step.
        steps_per_epoch: optimizer steps in an epoch.
        steps: optimizer steps of the run.
    """

    world: int
    accumulation: int
    steps_per_epoch: int
    steps: int


def shared(config: Config, world: int) -> Config:
    """The configuration for `world` processes.

    A micro-batch is at most one process's part of the global batch.

    Raises:
        ConfigError: micro-batches do not divide that part, and the message names a size that does;
            or CUDA graphs are wanted and `world` is above 1.
    """
    train, even = config.train, config.augment.mixup + config.augment.cutmix > 0
    if train.cuda_graph and world > 1:
        raise ConfigError(f"train.cuda_graph=true needs one process, got {_processes(world)}")
    part, rest = divmod(train.global_batch, world)
    if rest:
        raise ConfigError(
            f"train.global_batch={train.global_batch} cannot be shared by {world} processes"
        )
    micro = min(train.micro_batch, part)
    fit = [m for m in range(1, micro + 1) if part % m == 0 and not (even and m % 2)]
    if micro not in fit:
        raise ConfigError(
            f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={micro} "
            f"on {_processes(world)}" + (f"; {fit[-1]} would fit" if fit else " (even, for mixup)")
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, micro_batch=micro))


def plan(config: Config, images: int, world: int) -> Plan:
    """Compute batches and steps of a run.

    Args:
        config: as `shared` returns it.
        images: number of training images.
        world: number of processes.
    Raises:
        ConfigError: the images do not fill one batch.
    """
    train = config.train
    steps = images // train.global_batch
    if not steps:
        raise ConfigError(f"train.global_batch={train.global_batch} exceeds the {images} images")
    accumulation = train.global_batch // (train.micro_batch * world)
    return Plan(world, accumulation, steps, steps * train.epochs)


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
    if on_cpu and config.train.cuda_graph:
        raise ConfigError("train.cuda_graph=true needs a GPU; a CPU has no CUDA graphs")
    optimizers.check(config.optim.name, "cpu" if on_cpu else "cuda")


def build_model(config: Config, classes: int, device: str = "cpu") -> nn.Module:
    """Build the model, not wrapped by mesa_train.

    Raises:
        ConfigError: the name is unknown, or the model cannot take the image size.
    """
    import difflib

    import timm

    from mesa_train.models.lit.early_attention import without_early_attention

    model, size = config.model, config.data.image_size
    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), n=3)
        raise ConfigError(
            f"model.name: no model {model.name!r}" + (f"; {', '.join(near)}?" if near else "")
        )
    options: dict[str, Any] = {"num_classes": classes, "drop_path_rate": model.drop_path}
    options |= method_of(config).options()
    try:
        with torch.device(device):
            try:
                built = timm.create_model(model.name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                built = timm.create_model(model.name, **options)
        if model.early_stages_without_attention:
            without_early_attention(built, model.early_stages_without_attention)
        if model.grad_checkpointing:
            built.set_grad_checkpointing(True)
        method_of(config).built(built)
    except ConfigError:
        raise
    except TypeError as error:
        if config.method.name == "none":
            raise
        raise ConfigError(
            f"method.name={config.method.name}: {model.name} has no such method ({error})"
        ) from None
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{model.name} cannot take data.image_size={size}: {reason}") from None
    return built


def check_model(config: Config, classes: int) -> None:
    """Check on the meta device that the model is known and accepts the image size.

    The check allocates no memory.

    Raises:
        ConfigError: the model is unknown, cannot take the size, or is no classifier of images.
    """
    size = config.data.image_size
    model = build_model(config, classes, "meta").eval()
    try:
        with torch.no_grad():
            logits = model(torch.empty(1, 3, size, size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{config.model.name} cannot take data.image_size={size}: {reason}"
        ) from None
    if tuple(logits.shape) != (1, classes):
        raise ConfigError(f"model.name: {config.model.name} is no classifier of images")


def autocast_dtype(config: Config) -> torch.dtype | None:
    """The autocast dtype of a configuration; None for float32 throughout."""
    return precision(config).dtype


def memory(config: Config, classes: int) -> dict[str, int]:
    """Predicted bytes on one device that holds the whole model.

    Returns:
        Bytes by use: weights, gradients, optimizer, activations, images; teacher if the method has one.
    """
    method = method_of(config)
    model = build_model(config, classes, "meta")
    optimized = _optimized(config, model)
    method.mode(model)
    teacher = method.teacher_bytes(classes)
    size = config.data.image_size
    images = torch.empty(config.train.micro_batch, 3, size, size, device="meta")
    kept = mesa_train.footprint(
        model,
        images,
        policy=PLAIN if config.train.policy == "plain" else config.train.policy,
        autocast=autocast_dtype(config),
        loss=lambda output: method.counted_loss(model, output),
    )
    return {
        "weights": kept.parameter_bytes + kept.buffer_bytes,
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "optimizer": optimizers.state_bytes(config.optim.name, optimized),
        "activations": kept.saved_bytes,
        "images": images.numel() * 4,
        **({"teacher": teacher} if teacher else {}),
    }


def parameter_groups(config: Config, model: nn.Module) -> optimizers.Groups:
    """The parameter groups of a run: the recipe's, changed by the method.

    A parameter in no group is frozen here. Otherwise no one would clear its gradient, which would
    grow from step to step and enter the norm of the clipping.
    """
    groups = optimizers.groups(model, config.optim, config.train.global_batch)
    groups = method_of(config).groups(model, groups)
    trained = {id(p) for group in groups for p in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    return groups


def _optimized(config: Config, model: nn.Module) -> list[Tensor]:
    """The parameters that have optimizer states."""
    return [p for group in parameter_groups(config, model) for p in group["params"]]


def batches(config: Config, made: Plan) -> str:
    """Text that describes the parts of a global batch."""
    train = config.train
    return (
        f"batch {train.global_batch} = {train.micro_batch} x {made.accumulation} accumulated x "
        f"{_processes(made.world)}"
    )


def _processes(world: int) -> str:
    """Text with a number of processes."""
    return "1 process" if world == 1 else f"{world} processes"


def report(config: Config, classes: int, images: int, world: int) -> str:
    """The text of the dry run."""
    config = shared(config, world)
    made = plan(config, images, world)
    model = build_model(config, classes, "meta")
    train = config.train
    lines = [
        f"{config.model.name} at {config.data.image_size} px, {images} images, {classes} classes",
        batches(config, made),
        f"{made.steps} steps = {train.epochs} epochs of {made.steps_per_epoch}",
        f"policy {train.policy}, optimizer {config.optim.name}",
        precision(config).line,
        *method_of(config).plan(classes, images),
    ]
    for group in parameter_groups(config, model):
        count = sum(p.numel() for p in group["params"])
        rate = group["lr"] * group.get("lr_scale", 1)
        lines.append(
            f"group {group['name']:<18} {len(group['params']):>4} tensors {count:>12,} values  "
            f"lr {rate:.3g}  decay {group['weight_decay']:g}"
        )
    sizes = memory(config, classes)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    lines.append(f"predicted memory {format_bytes(sum(sizes.values()))}: {parts}")
    plain = dataclasses.replace(config, train=dataclasses.replace(train, policy="plain"))
    if train.policy != "plain":
        lines.append(f"plain would need {format_bytes(sum(memory(plain, classes).values()))}")
    return "\n".join(lines)
