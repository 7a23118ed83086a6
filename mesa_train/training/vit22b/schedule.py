"""Learning rate schedules and weight decay of ViT-22B.

The schedule is big_vision's reciprocal square root: a linear warm-up, 1 / sqrt(1 + (t - warmup) /
timescale), and a linear cool-down to zero over the last steps. ViT-22B uses peak 1e-3, 10,000 steps
of warm-up, 30,000 of cool-down, 177,000 in total. The timescale is that of the public ViT-g recipe,
10,000. Fine-tuning has a cosine. The decay differs between body and classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class ReciprocalSqrt:
    """Learning rate by optimizer step.

    Attributes:
        peak: highest rate.
        warmup: steps of linear warm-up; at least 0.
        cooldown: steps of linear cool-down; at least 0.
        total: steps of the run; at least warmup + cooldown.
        timescale: in steps; default 10,000; above 0.
    Raises:
        ValueError: a value is out of range, or warm-up and cool-down overlap.
    """

    peak: float
    warmup: int
    cooldown: int
    total: int
    timescale: int = 10_000

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.timescale <= 0 or self.total <= 0:
            raise ValueError(f"timescale={self.timescale} and total={self.total} must be positive")
        if self.warmup + self.cooldown > self.total:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} exceed the {self.total} steps"
            )

    def __call__(self, step: int) -> float:
        """The rate of the optimizer step that follows `step` steps."""
        up = min(1.0, step / self.warmup) if self.warmup else 1.0
        down = min(1.0, (self.total - step) / self.cooldown) if self.cooldown else 1.0
        behind = max(0, step - self.warmup)
        return self.peak * up * max(0.0, down) / (1 + behind / self.timescale) ** 0.5


@dataclass(frozen=True)
class Cosine:
    """Learning rate by optimizer step: a linear warm-up, then half a cosine to 0.

    Attributes:
        peak: highest rate.
        warmup: steps of linear warm-up; at least 0.
        total: steps of the run; above warmup.
    Raises:
        ValueError: the warm-up is negative or as long as the run.
    """

    peak: float
    warmup: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"warmup={self.warmup} must be at least 0 and below the {self.total} steps"
            )

    def __call__(self, step: int) -> float:
        """The rate of the optimizer step that follows `step` steps."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        share = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.peak * (1 + math.cos(math.pi * share)) / 2


def schedule_of(config: Config) -> Callable[[int], float]:
    """The schedule of a configuration."""
    optim, total = config.optim, config.train.steps
    if optim.schedule == "cosine":
        return Cosine(optim.lr, optim.warmup, total)
    return ReciprocalSqrt(optim.lr, optim.warmup, optim.cooldown, total, optim.timescale)


def groups(
    model: nn.Module, weight_decay: float = 0.03, head_decay: float = 3.0
) -> list[dict[str, Any]]:
    """Parameter groups of ViT-22B. Empty groups are left out.

    "head" is the classifier's weight. "no_decay" holds biases, norms, position embedding and probe.
    "body" is the rest. The decay is decoupled: lr * decay * weight.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    members: dict[str, list[nn.Parameter]] = {"body": [], "head": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves an empty tensor and stores the shape in `ds_shape`.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        vector = len(shape) < 2 or name in exempt
        kind = "no_decay" if vector else "head" if name == "head.weight" else "body"
        members[kind].append(parameter)
    decay = {"body": weight_decay, "head": head_decay, "no_decay": 0.0}
    return [
        {"params": found, "name": kind, "weight_decay": decay[kind]}
        for kind, found in members.items()
        if found
    ]
