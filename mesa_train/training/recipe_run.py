"""A training run of a recipe with its own loss: epochs, one batch a step, a cosine schedule.

Why: recipes beside classification (MoCo v3, LiT, decoders, video) differ in batches, loss and
evaluation. What surrounds the loss is the same.

How: a recipe's run subclasses `RecipeRun` and gives `epoch_batches`, `loss` and `evaluate`. The
random generators of a step are seeded from (seed, step, rank), and a checkpoint holds all other
state, so a run that was killed continues exactly. Gradients are averaged over processes after the
backward. A recipe with another step overrides `step`. `accelerated_run.py` has the checkpoints.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .accelerated_run import CHECKPOINTS as CHECKPOINTS
from .accelerated_run import AcceleratedRun
from .accelerated_run import check_settings as check_settings
from .accelerated_run import resume as resume
from .config_schema import ConfigError
from .data.sources import seed_all
from .loop import Cadence


class RecipeRun(AcceleratedRun, abc.ABC):
    """A model in training.

    Args:
        config: of the run, with the sections `train` and `optim`, and `to_dict`.
        accelerator: Accelerate's, for the processes and the device.
        images: training samples of an epoch.
    """

    fixed: ClassVar = {"train": ("global_batch", "epochs", "seed")}

    def __init__(self, config: Any, accelerator: Any, images: int) -> None:
        super().__init__(config, accelerator, images)
        train, world = config.train, self.world
        if train.global_batch % world:
            raise ConfigError(
                f"train.global_batch={train.global_batch} must be a multiple of the {world} processes"
            )
        steps = images // train.global_batch
        if not steps:
            raise ConfigError(
                f"train.global_batch={train.global_batch} exceeds the {images} images"
            )
        self.batch = train.global_batch // world
        self.cadence = Cadence(train.epochs * steps, steps, train.log_every, train.save_every)
        torch.manual_seed(train.seed)

    @abc.abstractmethod
    def epoch_batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Batches of this process in an epoch, from its optimizer step `first`."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch of this process. The mean over processes is that of the step."""
        raise NotImplementedError(f"{type(self).__name__} overrides step")

    def evaluate(self) -> dict[str, float]:
        """Scores of the model on held-out data by name, for the rows of an epoch. All ranks."""
        return {}

    def export(self) -> Path:
        """Write the weights of the end of the run. Returns the file."""
        raise NotImplementedError

    def batches(self) -> Iterator[Any]:
        """Batches of this process, from the next step to the end of its epoch."""
        self.model.train()
        return self.epoch_batches(*divmod(self.done, self.cadence.epoch))

    def step(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step. Returns (loss of this process, norm of the gradient)."""
        batch = next(batches)
        rate = self.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        seed_all(self.config.train.seed, self.steps, self.rank)
        with self.autocast():
            loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return loss.detach(), self.update(trained, self.config.optim.clip)

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps: linear warm-up, cosine to 0."""
        warm = self.config.optim.warmup_epochs * self.cadence.epoch
        peak = float(self.config.optim.lr)
        if step < warm:
            return peak * (step + 1) / max(warm, 1.0)
        share = (step - warm) / max(1.0, self.cadence.steps - warm)
        return peak * (1 + math.cos(math.pi * share)) / 2


def decayed(parameters: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of an optimizer: matrices with the decay, and biases, norms and scalars without."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
