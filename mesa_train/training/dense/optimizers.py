"""Parameter groups and schedules of the dense recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mesa_train.training.classification import optimizers
from mesa_train.training.classification.config import OptimConfig as Classification

from .config import OptimConfig

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # also the synchronised one
)


def groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The parameter groups "weights" and "norms". The norms have no decay with `not_norms`."""
    exempt = {
        id(parameter)
        for module in model.modules()
        if config.decay == "not_norms" and isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [
        ("weights", [p for p in trained if id(p) not in exempt], config.weight_decay),
        ("norms", [p for p in trained if id(p) in exempt], 0.0),
    ]
    return [
        {"name": name, "params": own, "lr": config.lr, "weight_decay": decay}
        for name, own, decay in found
        if own
    ]


def build(config: OptimConfig, parameter_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of a configuration. ConfigError if its package is missing."""
    same = Classification(name=config.name, betas=config.betas, eps=config.eps)
    return optimizers.build(same, parameter_groups)


def rate(config: OptimConfig, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        config: of the optimizer.
        step: steps done before.
        steps: of the run.
        per_epoch: steps in an epoch.
    """
    if config.schedule == "poly":
        value = (config.lr - config.min_lr) * (1 - step / steps) ** config.power + config.min_lr
    else:
        passed = sum(step >= round(epoch * per_epoch) for epoch in config.milestones)
        value = config.lr * 0.1**passed
    if step < config.warmup_steps:
        value *= 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_factor)
    return value
