"""Training loop of the ViT-22B recipes: same batches, schedule, log and checkpoints on any backend.

A global batch depends on (seed, step) only, and each data-parallel rank reads its own part
(`data.py`). The losses therefore equal the losses of a single process, for any number of ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mesa_train.models.vit22b.model import SIZES, sigmoid_loss

from . import data as sharded_data
from .backend import Backend
from .checkpoint import newest, state_of
from .config import Config, ConfigError
from .launch import make_backend
from .schedule import ReciprocalSqrt
from .stability import AttentionWatch, Guard

Report = Callable[[dict[str, Any]], None]


def train(config: Config, report: Report) -> Backend:
    """Train as configured.

    Args:
        config: of the run.
        report: called on rank 0 with one row for each step: step, loss, lr, norm, images_per_s, and
            on a GPU peak_bytes and mfu.
    Returns:
        The backend, still open.
    """
    schedule = _schedule(config)
    data = sharded_data.load(config)
    out, first, checkpoint = Path(config.train.out), 0, None
    if config.train.resume:
        checkpoint = newest(out) if config.train.resume == "last" else Path(config.train.resume)
        if checkpoint is None:
            raise ConfigError(f"train.resume=last, but {out} has no complete checkpoint")
    images = data.train.count
    if checkpoint is not None:
        _check_images(checkpoint, images)
    engine = make_backend(config, data.classes, checkpoint)
    if checkpoint is not None:
        first = int(engine.load(checkpoint)["step"])
    watch = AttentionWatch(engine.model, every=config.train.watch_every)
    guard = Guard(engine.model)
    ranks = (engine.data_rank, engine.data_ranks)
    start = time.perf_counter()
    for step, batches in enumerate(sharded_data.batches(config, data, *ranks, first), first):
        loss = torch.zeros((), device=engine.device)
        with watch.step(step), guard.step(step):
            for part, target in batches:
                part, target = part.to(engine.device), target.to(engine.device)
                value = sigmoid_loss(engine.forward(part), target, config.optim.z_loss)
                engine.backward(value)
                loss += value.detach() / len(batches)
        norm = engine.step(schedule(step))
        if engine.data_ranks > 1:
            dist.all_reduce(loss)
            # Tensor-parallel ranks hold the same loss, so the sum counts it once for each of them.
            loss /= dist.get_world_size()
        guard.check(loss.item(), norm)
        if engine.rank == 0:
            seconds = time.perf_counter() - start
            row = {"step": step + 1, "loss": loss.item(), "lr": schedule(step), "norm": norm}
            report(row | _speed(config, seconds) | watch.row())
        every = config.train.save_every
        if (every and (step + 1) % every == 0) or (every and step + 1 == config.train.steps):
            engine.save(out, {"step": step + 1, "config": config.to_dict(), "images": images})
        start = time.perf_counter()
    return engine


def _check_images(checkpoint: Path, images: int) -> None:
    """Raise ConfigError if a checkpoint was trained on another number of images.

    An epoch would then have another number of steps. Older checkpoints lack this entry.
    """
    before = state_of(checkpoint).get("images", images)
    if before != images:
        raise ConfigError(
            f"data: {images} training images, but {checkpoint} was trained on {before}; its epochs "
            "cannot be continued on another data set: choose another train.out, and model.weights "
            "to start from its weights"
        )


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


def append_to(path: Path) -> Report:
    """A report that appends rows to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def report(row: dict[str, Any]) -> None:
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            # An error on an open file does not name the file.
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from None

    return report


def _schedule(config: Config) -> ReciprocalSqrt:
    """The schedule of a configuration."""
    optim = config.optim
    return ReciprocalSqrt(
        optim.lr, optim.warmup, optim.cooldown, config.train.steps, optim.timescale
    )


def _speed(config: Config, seconds: float) -> dict[str, float]:
    """Images per second, peak bytes and MFU of a step, as far as they are known."""
    rate = config.train.global_batch / seconds
    row: dict[str, float] = {"images_per_s": rate}
    if torch.cuda.is_available():
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    peak: float | None = config.train.peak_tflops
    if not peak and torch.cuda.is_available():
        peak = peak_tflops_of(torch.cuda.get_device_name())
    if peak:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        flops = rate * model_flops(config.model.name, config.model.image_size)
        row["mfu"] = flops / (peak * 1e12 * ranks)
    return row
