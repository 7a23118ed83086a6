"""Dry run of a ViT-22B recipe: its batches, parameter groups and the memory of a card by component.

`mesa_train.estimate.estimator` counts the memory on the meta device.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mesa_train.estimate.estimator import Estimate, Setup
from mesa_train.estimate.model_states import Cluster
from mesa_train.methods.apply import CHECKPOINT
from mesa_train.utils.formatting import format_bytes

from . import estimates
from .backend import backend_name, build
from .config import Config, accumulation, precision_of
from .schedule import groups

_UNLIMITED = 1 << 60


def method_of(policy: str, checkpointing: str) -> str:
    """The estimator's name for a policy and a kind of checkpointing."""
    if checkpointing == "none":
        return policy
    if policy == "plain":
        return CHECKPOINT
    return f"{policy}+{'coded' if checkpointing == 'coded' else CHECKPOINT}"


def predict(config: Config, world: int) -> Estimate:
    """Estimate the memory of one card of `world`, for a micro-batch.

    Raises:
        ConfigError: configuration and launcher do not match.
    """
    train, backend = config.train, backend_name(config, world)
    offload = "none"
    if backend == "zero3":
        offload = _offload(deepspeed_settings())
    elif backend == "fsdp2" and train.offload:
        offload = "cpu"
    strategy = "ddp" if backend == "single" else backend
    setup = Setup(strategy, offload, config.optim.name, half=train.precision == "pure_bf16")
    cluster = Cluster(world, _UNLIMITED, _UNLIMITED, tensor_parallel=train.tensor_parallel)
    counted = estimates.estimator(
        config.model.name, config.model.image_size, train.micro_batch, [train.micro_batch]
    )
    return counted.estimate(setup, method_of(train.policy, train.checkpointing), cluster)


def report(config: Config, world: int, classes: int) -> str:
    """The text of the dry run.

    Raises:
        ConfigError: the batch does not divide over the ranks.
    """
    train, model = config.train, build(config, classes, "meta")
    if world % train.tensor_parallel:
        from mesa_train.models.vit22b.parallel import mesh_of

        mesh_of("cpu", world, train.tensor_parallel)
    ranks = world // train.tensor_parallel
    turns = accumulation(train, ranks)
    found = predict(config, world)
    tokens = " and the tokens" if train.sequence_parallel else ""
    lines = [
        f"{config.model.name} at {config.model.image_size} px, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {classes} classes",
        f"{found.strategy} on {world} processes"
        + (
            f", {train.tensor_parallel} share the heads{tokens}"
            if train.tensor_parallel > 1
            else ""
        )
        + (f", offload {found.offload}" if found.offload != "none" else ""),
        f"batch {train.global_batch} = {train.micro_batch} x {turns} accumulated x {ranks} ranks, "
        f"{train.steps} steps",
        f"policy {found.policy}, precision {train.precision}, optimizer {found.optimizer}",
        precision_of(config).line,
    ]
    for group in groups(model, config.optim.weight_decay, config.optim.head_decay):
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"group {group['name']:<8} {len(group['params']):>4} tensors {count:>15,} values  "
            f"decay {group['weight_decay']:g}"
        )
    parts = estimates.components(found)
    if train.ema:
        count = sum(p.numel() for p in model.parameters())
        parts["average"] = 4 * count // world
    lines.append(f"a card needs {format_bytes(sum(parts.values()))} and some 2 GiB of context:")
    lines += [f"  {name:<12} {format_bytes(size)}" for name, size in parts.items()]
    for name, size in (("CPU memory", found.states.cpu), ("NVMe", found.states.disk)):
        if size:
            lines.append(f"  {name:<12} {format_bytes(size)} of the machine")
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        lines.append(f"  free here    {format_bytes(free)}")
    return "\n".join(lines)


def deepspeed_settings() -> dict[str, Any]:
    """DeepSpeed's configuration that the launcher names; empty if it names none."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings


def _offload(settings: dict[str, Any]) -> str:
    """The estimator's name for the offloading in DeepSpeed's configuration."""
    zero = settings.get("zero_optimization", {})
    weights, optimizer = (
        (zero.get(key) or {}).get("device", "none")
        for key in ("offload_param", "offload_optimizer")
    )
    if "nvme" in (weights, optimizer):
        return "nvme"
    return "cpu" if weights == "cpu" else "optimizer" if optimizer == "cpu" else "none"
