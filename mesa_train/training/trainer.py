"""Plain training loop for small experiments: AdamW, cosine schedule with warm-up, evaluation.

A `Trainer` optimises one model. `fit` trains several models at once, step by step over the same
batches. Other load on the machine therefore slows all models alike, and their times stay
comparable. With one trainer, `fit` is an ordinary loop.

Before each step, the global random generators are seeded from (seed, step). Dropout and drop path
are therefore the same for all trainers of one seed, independent of other work in between.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training.config_schema import NOT_NEGATIVE, POSITIVE, SHARE, check_fields
from mesa_train.training.data.packaged import ImageSet, Transform, held_out_batches, train_batches


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one experiment.

    Attributes:
        epochs: passes over the data; default 10; at least 1.
        batch_size: images in a step; default 64; at least 1.
        lr: peak learning rate at this batch size (it is not scaled); default 1e-3; above 0. A
            cosine lowers it to a hundredth.
        weight_decay: of AdamW; default 0.05.
        warmup: share of all steps in which the rate rises; default 0.1; in [0, 1).
        label_smoothing: default 0.1; in [0, 1).
        clip_norm: largest norm of the gradient; default 1.0; above 0.
        autocast: dtype of the forward; default bfloat16; None for no autocast.
        seed: of data order, dropout and drop path; default 0.
        device: default "cpu".
    """

    epochs: Annotated[int, POSITIVE] = 10
    batch_size: Annotated[int, POSITIVE] = 64
    lr: Annotated[float, POSITIVE] = 1e-3
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    warmup: Annotated[float, SHARE] = 0.1
    label_smoothing: Annotated[float, SHARE] = 0.1
    clip_norm: Annotated[float, POSITIVE] = 1.0
    autocast: torch.dtype | None = torch.bfloat16
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class EpochResult:
    """The result of one trainer in one epoch.

    Attributes:
        name: of the trainer.
        epoch: counts from 1.
        train_loss: mean over the steps, label smoothing included.
        val_loss: mean over the held-out images.
        val_accuracy: top-1, 0 to 1.
        step_ms: median time of a step in milliseconds.
        lr: learning rate after the epoch.
    """

    name: str
    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    step_ms: float
    lr: float

    def row(self) -> dict[str, str | int | float]:
        """The result as a dictionary of plain values."""
        return dataclasses.asdict(self)


class Trainer:
    """One model with its optimizer and schedule.

    Args:
        model: moved to `config.device`.
        config: the hyperparameters.
        steps_per_epoch: optimizer steps in an epoch.
    """

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
        # Float16 gradients underflow without scaling. The scaler is off for other dtypes.
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.autocast is torch.float16)
        self.steps = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def loss(self, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in float32 of a forward under the configured autocast."""
        return F.cross_entropy(self._logits(images), labels, label_smoothing=label_smoothing)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take one optimizer step on a batch. Returns its loss, label smoothing included."""
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
        """Logits in float32 of a forward under the configured autocast."""
        dtype = self.config.autocast
        device_type = torch.device(self.config.device).type
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            return self.model(images).float()


@dataclass
class StepEvent:
    """One step of one trainer, passed to the `watch` callback of `fit`.

    Attributes:
        name: of the trainer.
        step: counts from 1 over the whole run.
        loss: with label smoothing.
        time_ms: milliseconds.
    """

    name: str
    step: int
    loss: float
    time_ms: float


@dataclass
class _Tally:
    """Losses and step times of one trainer in one epoch."""

    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)


def fit(
    trainers: Mapping[str, Trainer],
    data: ImageSet,
    config: TrainConfig,
    *,
    transform: Transform | None = None,
    watch: Callable[[StepEvent], None] | None = None,
    first_epoch: int = 0,
) -> Iterator[EpochResult]:
    """Train all trainers on the same batches, one step each in turn.

    The order of the trainers is reversed after every step.

    Args:
        trainers: by name, all built with `config`.
        data: training and held-out images.
        config: the hyperparameters.
        transform: augmentation of a batch; None for none.
        watch: called after every step.
        first_epoch: number of epochs that the trainers have done already; default 0.
    Yields:
        One result for each trainer and epoch, in the order of `trainers`.
    """
    names = list(trainers)
    if first_epoch * data.steps_per_epoch(config.batch_size) % 2:
        names.reverse()
    for epoch in range(first_epoch, config.epochs):
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
