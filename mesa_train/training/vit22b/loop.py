"""Training of the ViT-22B recipes: same batches, schedule, log and checkpoints on any backend.

A global batch depends on (seed, step) only, and each data-parallel rank reads its own part
(`data.py`). The losses therefore equal the losses of a single process, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mesa_train.models.vit22b.model import SIZES, sigmoid_loss
from mesa_train.training import loop
from mesa_train.training.checkpoints import check_images
from mesa_train.training.data.sources import Sources
from mesa_train.training.loop import Cadence, StepResult, TrainingRun

from . import data as sharded_data
from .backend import Backend
from .checkpoint import newest, state_of
from .config import Config, ConfigError
from .launch import make_backend
from .schedule import schedule_of
from .stability import AttentionWatch, Guard

Report = Callable[[dict[str, Any]], None]


class ShardedRun(TrainingRun):
    """A model of the ViT-22B recipes in training, on any backend.

    Args:
        config: of the run.
        backend: model, optimizer and processes.
        data: the images.
        first: optimizer steps that the loaded checkpoint has done; 0 for a new run.
    """

    def __init__(self, config: Config, backend: Backend, data: Sources, first: int) -> None:
        train = config.train
        self.config, self.backend, self.data = config, backend, data
        self.cadence = Cadence(train.steps, train.steps, save_every=train.save_every)
        self.schedule = schedule_of(config)
        self.watch = AttentionWatch(backend.model, every=train.watch_every)
        self.guard = Guard(backend.model)
        self.steps = first

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.steps

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self.schedule(self.steps - 1)

    def batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """This rank's micro-batches of each step, from the next step on."""
        ranks = self.backend.data_rank, self.backend.data_ranks
        return sharded_data.batches(self.config, self.data, *ranks, self.steps)

    def step(self, batches: Iterator[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, float]:
        """Take one optimizer step. Returns (loss of this rank, norm of the gradient)."""
        backend, parts = self.backend, next(batches)
        loss = torch.zeros((), device=backend.device)
        with self.watch.step(self.steps), self.guard.step(self.steps):
            for images, target in parts:
                images, target = images.to(backend.device), target.to(backend.device)
                value = self.loss(backend.forward(images), target)
                backend.backward(value)
                loss += value.detach() / len(parts)
        norm = backend.step(self.schedule(self.steps))
        self.steps += 1
        if backend.average is not None:
            backend.average.update(self.steps)
        return loss, norm

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of a micro-batch, in float32."""
        optim = self.config.optim
        if optim.loss == "softmax":
            return F.cross_entropy(logits.float(), targets)
        return sigmoid_loss(logits, targets, optim.z_loss)

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all ranks.

        Tensor-parallel ranks hold the same loss. The sum counts it once for each of them.
        """
        if self.backend.data_ranks == 1:
            return loss
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    def accept(self, result: StepResult) -> None:
        """Raise DivergenceError if the step diverged."""
        self.guard.check(result.loss, result.grad_norm)

    def save(self) -> Path:
        """Write a checkpoint from all ranks."""
        images = self.data.train.count
        state = {"step": self.steps, "config": self.config.to_dict(), "images": images}
        return self.backend.save(Path(self.config.train.out), state)


def train(config: Config, report: Report) -> Backend:
    """Train as configured.

    Args:
        config: of the run.
        report: called on rank 0 with one row for each step: step, loss, lr, norm, images_per_s, and
            on a GPU peak_bytes and mfu.
    Returns:
        The backend, still open.
    """
    data = sharded_data.load(config)
    out, first, checkpoint = Path(config.train.out), 0, None
    if config.train.resume:
        checkpoint = newest(out) if config.train.resume == "last" else Path(config.train.resume)
        if checkpoint is None:
            raise ConfigError(f"train.resume=last, but {out} has no complete checkpoint")
        check_images(checkpoint, state_of(checkpoint), data.train.count)
    backend = make_backend(config, data.classes, checkpoint)
    if checkpoint is not None:
        first = int(backend.load(checkpoint)["step"])
        if backend.average is not None:
            backend.average.load(checkpoint)
    run = ShardedRun(config, backend, data, first)

    def row_of(result: StepResult) -> None:
        if backend.rank == 0:
            row = {"step": result.step, "loss": result.loss, "lr": result.lr}
            row |= {"norm": result.grad_norm} | _speed(config, result.step_ms, backend.device)
            report(row | run.watch.row())

    def end_of_epoch(epoch: int, step_ms: float) -> None:  # noqa: ARG001
        if config.train.save_every:
            run.save()

    loop.train(run, row_of, end_of_epoch=end_of_epoch)
    return backend


def model_flops(name: str, image_size: int) -> float:
    """Floating-point operations of one image's forward and backward.

    Attention counts; recomputation does not.
    """
    patch, width, depth, _ = SIZES[name]
    tokens = (image_size // patch) ** 2
    return tokens * depth * (6 * 12 * width**2 + 12 * width * tokens)


# Dense bfloat16 multiply-adds with float32 sums, in 1e12 operations a second, from the data sheets.
# The first name that occurs in the device's name applies.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def peak_tflops_of(device_name: str) -> float | None:
    """A card's bfloat16 peak in 1e12 operations a second; None for an unknown name."""
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def _speed(config: Config, step_ms: float, device: torch.device) -> dict[str, float]:
    """Images per second, peak bytes and MFU of a step, as far as they are known."""
    row = loop.speed(config.train.global_batch, step_ms, device)
    peak: float | None = config.train.peak_tflops
    if not peak and device.type == "cuda":
        peak = peak_tflops_of(torch.cuda.get_device_name(device))
    if peak:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        flops = row["images_per_s"] * model_flops(config.model.name, config.model.image_size)
        row["mfu"] = flops / (peak * 1e12 * ranks)
    return row
