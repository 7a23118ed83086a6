"""A plain training loop for small experiments: AdamW, cosine schedule with warm-up, evaluation.

A `Trainer` owns one model's optimisation. `fit` drives several at once, step by step over the
same batches, so that a comparison of their times is not at the mercy of what else the machine
does; with a single trainer it is an ordinary loop.

Before each step the global random streams are seeded from (seed, step). Dropout and drop path
are therefore the same for every trainer of one seed, whatever ran in between.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training.data.packaged import ImageSet, Transform, held_out_batches, train_batches


@dataclass(frozen=True)
class TrainConfig:
    """One experiment's hyperparameters; `autocast` is None or the dtype of the forward pass.

    `lr` is the peak rate for this batch size (it is not scaled), reached after the share `warmup`
    of all steps and then lowered along a cosine to a hundredth of itself.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    autocast: torch.dtype | None = torch.bfloat16
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")


@dataclass(frozen=True)
class EpochResult:
    """What one trainer did in one epoch; `epoch` counts from 1, `step_ms` is a median."""

    name: str
    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    step_ms: float
    lr: float

    def row(self) -> dict[str, str | int | float]:
        return dataclasses.asdict(self)


class Trainer:
    """One model with its optimizer and schedule."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        self.model = model.to(config.device)
        self.config = config
        # timm's factory exempts biases and norms from weight decay.
        self.optimizer = create_optimizer_v2(
            model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay
        )
        total_steps = config.epochs * steps_per_epoch
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=total_steps,
            lr_min=config.lr / 100,
            warmup_t=round(config.warmup * total_steps),
            warmup_lr_init=config.lr / 100,
            t_in_epochs=False,
        )
        # Float16's gradients are too small without; the scaler leaves other dtypes alone.
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.autocast is torch.float16)
        self.steps = 0

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def loss(self, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in float32 of a forward pass under the configured autocast."""
        return F.cross_entropy(self._logits(images), labels, label_smoothing=label_smoothing)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One optimizer step on a batch; returns its loss, label smoothing included."""
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + self.steps)
        self.model.train()
        images, labels = images.to(config.device), labels.to(config.device)
        loss = self.loss(images, labels, config.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.schedule.step_update(self.steps)
        return loss.item()

    @torch.no_grad()
    def evaluate(self, data: ImageSet) -> tuple[float, float]:
        """Mean loss and top-1 accuracy (0 to 1) on the held-out images."""
        self.model.eval()
        loss, correct = 0.0, 0
        for images, labels in held_out_batches(data):
            labels = labels.to(self.config.device)
            logits = self._logits(images.to(self.config.device))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(dim=-1) == labels).sum())
        return loss / len(data.held_out), correct / len(data.held_out)

    def _logits(self, images: Tensor) -> Tensor:
        dtype = self.config.autocast
        device_type = torch.device(self.config.device).type
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            return self.model(images).float()


@dataclass
class StepEvent:
    """Told to `fit`'s watcher after every step; `step` counts from 1 over the whole run."""

    name: str
    step: int
    loss: float
    time_ms: float


@dataclass
class _Tally:
    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)


def fit(
    trainers: Mapping[str, Trainer],
    data: ImageSet,
    config: TrainConfig,
    *,
    transform: Transform | None = None,
    watch: Callable[[StepEvent], None] | None = None,
) -> Iterator[EpochResult]:
    """Train all `trainers` on the same batches, one step each in turn, turns reversed every step.

    Yields one result per trainer and epoch. All trainers must have been built with `config`.
    """
    names = list(trainers)
    for epoch in range(config.epochs):
        tallies = {name: _Tally() for name in names}
        batches = train_batches(
            data, config.batch_size, seed=config.seed, epoch=epoch, transform=transform
        )
        for images, labels in batches:
            names.reverse()
            for name in names:
                start = time.perf_counter()
                loss = trainers[name].step(images, labels)
                time_ms = (time.perf_counter() - start) * 1e3
                tallies[name].losses.append(loss)
                tallies[name].times_ms.append(time_ms)
                if watch is not None:
                    watch(StepEvent(name, trainers[name].steps, loss, time_ms))
        for name, trainer in trainers.items():
            val_loss, val_accuracy = trainer.evaluate(data)
            yield EpochResult(
                name=name,
                epoch=epoch + 1,
                train_loss=statistics.fmean(tallies[name].losses),
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                step_ms=statistics.median(tallies[name].times_ms),
                lr=trainer.lr,
            )
