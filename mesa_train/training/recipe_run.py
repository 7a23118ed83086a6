"""A training run of a recipe with its own loss: processes, precision, schedule, checkpoints.

Why: recipes beside classification (MoCo v3, LiT, dense decoders, video) differ in batches, loss and
evaluation. What surrounds the loss is the same.

How: a recipe's run subclasses `RecipeRun` and gives `epoch_batches`, `loss` and `evaluate`. The
random generators of a step are seeded from (seed, step, rank), and a checkpoint holds all other
state, so a run that was killed continues exactly. Gradients are averaged over processes after the
backward. A recipe with another step overrides `step`.

A checkpoint holds `model.safetensors`, `optimizer.pt` and the state; see `checkpoints.py`.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mesa_train.models.moco.backward import average_gradients
from mesa_train.utils.precision import choose

from . import checkpoints, disk
from .config_schema import ConfigError
from .data.sources import seed_all
from .loop import Cadence, StepResult, TrainingRun

CHECKPOINTS, WEIGHTS, OPTIMIZER = "checkpoints", "model.safetensors", "optimizer.pt"
# Settings that decide the steps of a run.
FIXED = ("global_batch", "epochs", "seed")


class RecipeRun(TrainingRun, abc.ABC):
    """A model in training.

    Args:
        config: of the run, with the sections `train` and `optim`, and `to_dict`.
        accelerator: Accelerate's, for the processes and the device.
        images: training samples of an epoch.

    Attributes:
        model: all modules whose weights a checkpoint holds; set by the subclass.
        optimizer: set by the subclass.
        shapes: of the model's keys before mesa_train wrapped it; set by the subclass.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, list[int]]

    def __init__(self, config: Any, accelerator: Any, images: int) -> None:
        train, world = config.train, accelerator.num_processes
        if train.global_batch % world:
            raise ConfigError(
                f"train.global_batch={train.global_batch} must be a multiple of the {world} processes"
            )
        steps = images // train.global_batch
        if not steps:
            raise ConfigError(
                f"train.global_batch={train.global_batch} exceeds the {images} images"
            )
        self.config, self.accelerator, self.images = config, accelerator, images
        self.device: torch.device = accelerator.device
        self.batch = train.global_batch // world
        self.cadence = Cadence(train.epochs * steps, steps, train.log_every, train.save_every)
        self.precision = choose(train.precision, self.device.type)
        fp16 = self.precision.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.steps, self.out = 0, Path(train.out)
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

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.steps

    @property
    def main(self) -> bool:
        """True on the first process."""
        return bool(self.accelerator.is_main_process)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """The number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def batches(self) -> Iterator[Any]:
        """Batches of this process, from the next step to the end of its epoch."""
        self.model.train()
        return self.epoch_batches(*divmod(self.done, self.cadence.epoch))

    def step(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step. Returns (loss of this process, norm of the gradient)."""
        batch, train, optim = next(batches), self.config.train, self.config.optim
        rate = self.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        seed_all(train.seed, self.steps, self.rank)
        with self.autocast():
            loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach(), norm

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps: linear warm-up, cosine to 0."""
        warm = self.config.optim.warmup_epochs * self.cadence.epoch
        peak = float(self.config.optim.lr)
        if step < warm:
            return peak * (step + 1) / max(warm, 1.0)
        share = (step - warm) / max(1.0, self.cadence.steps - warm)
        return peak * (1 + math.cos(math.pi * share)) / 2

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward in the configured precision."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def row(self) -> dict[str, float]:
        """Further columns of a step's row."""
        return {}

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all processes."""
        return self.accelerator.reduce(loss, reduction="mean")

    def accept(self, result: StepResult) -> None:
        """FloatingPointError if the loss is not finite."""
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"the loss is {result.loss} after step {result.step}; a lower optim.lr usually helps"
            )

    def save(self) -> Path:
        """Write a checkpoint; the first process writes, and all wait.

        Raises:
            CheckpointError: on all processes if it cannot be written.
        """
        from accelerate.utils import gather_object

        folder = self.out / CHECKPOINTS
        written = checkpoints.partial(folder, self.steps)
        final = folder / written.name.removeprefix(checkpoints.PARTIAL)

        def write() -> None:
            if not self.main:
                return
            checkpoints.clear(written)
            checkpoints.save_weights(written / WEIGHTS, self.model.state_dict(), {})
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            torch.save(state, written / OPTIMIZER)
            about = {
                "step": self.steps,
                "config": self.config.to_dict(),
                "shapes": self.shapes,
                "images": self.images,
            }
            checkpoints.commit(written, about, self.config.train.keep)

        disk.together(write, final, written, gather_object)
        return final

    def resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoints.verify` has accepted.

        Raises:
            CheckpointError: the checkpoint is of another model.
            ConfigError: batch, epochs, seed or data differ, so that the steps would not match.
        """
        with disk.reading(checkpoint):
            checkpoints.check_keys(checkpoint, state["shapes"], self.shapes)
        check_settings(checkpoint, state, self.config, {"train": FIXED})
        checkpoints.check_images(checkpoint, state, self.images)
        checkpoints.load_weights(self.model, checkpoint / WEIGHTS)
        with disk.reading(checkpoint / OPTIMIZER):
            found = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(found["optimizer"])
            self.scaler.load_state_dict(found["scaler"])
        self.steps = int(state["step"])


class Resumable(Protocol):
    """The part of a run that `resume` needs."""

    out: Path

    @property
    def main(self) -> bool: ...

    @property
    def done(self) -> int: ...

    def resume(self, checkpoint: Path, state: dict[str, Any]) -> None: ...


def check_settings(
    checkpoint: Path, state: dict[str, Any], config: Any, fixed: Mapping[str, Sequence[str]]
) -> None:
    """ConfigError if a setting differs from the checkpoint's, so that the steps would not match.

    Args:
        checkpoint: its folder.
        state: of the checkpoint, from `checkpoints.verify`.
        config: of the run.
        fixed: names of settings, by section of the configuration.
    """
    with disk.reading(checkpoint):
        before = {
            (s, name): state["config"][s][name] for s, names in fixed.items() for name in names
        }
    for (section, name), then in before.items():
        now = getattr(getattr(config, section), name)
        if then != now:
            raise ConfigError(
                f"{section}.{name}={now}, but {checkpoint} was trained with {then}; keep it or "
                "choose another train.out"
            )


def resume(run: Resumable, how: str, metrics: str) -> bool:
    """Continue a run.

    Args:
        run: ready to start.
        how: "auto" for the newest complete checkpoint, "" for a new run, or a checkpoint's path.
        metrics: name of the file of rows in the run's folder.
    Returns:
        True if the run continues.
    Raises:
        ConfigError: there is no such checkpoint, or a new run would overwrite another.
    """
    if how not in ("", "auto"):
        if not Path(how).is_dir():
            raise ConfigError(f"--resume: no such checkpoint {how}")
        found = Path(how), checkpoints.verify(Path(how))
    else:
        newest = checkpoints.newest(run.out / CHECKPOINTS)
        if newest is not None and not how:
            raise ConfigError(
                f"train.out={run.out} holds a run already: --resume auto continues it, or choose "
                "another folder"
            )
        if newest is None:
            if run.main:
                (run.out / metrics).unlink(missing_ok=True)
            return False
        found = newest
    run.resume(*found)
    if run.main:
        disk.forget_after(run.out / metrics, run.done)
    return True


def decayed(parameters: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of an optimizer: matrices with the decay, and biases, norms and scalars without."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
