"""Configuration sections `optim` and `train` that recipes share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .config_schema import NOT_NEGATIVE, POLICY, POSITIVE, ConfigError, OneOf

PRECISIONS = ("no", "bf16", "fp16", "auto")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then cosine to 0.

    Attributes:
        lr: peak rate; default 1e-3.
        weight_decay: of matrices; default 0.05. Biases, norms and scalars do not decay.
        warmup_epochs: default 1; fewer than `train.epochs`.
        clip: largest norm of the gradient; default 1.
    """

    lr: Annotated[float, POSITIVE] = 1e-3
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 1
    clip: Annotated[float, POSITIVE] = 1.0


@dataclass(frozen=True)
class RunConfig:
    """Batch, precision, policy, checkpoints and folder of a run: base of the section `train`.

    Attributes:
        global_batch: samples in a step over all processes; default 64.
        precision: "no", "bf16", "fp16" or "auto" (default). "auto": bf16 if the device has it, else
            float32 on a CPU, fp16 on a GPU (`precision.py`).
        policy: "plain" or a mesa_train preset, with or without "+offload"; default "mesa8".
        seed: default 0.
        log_every: optimizer steps between log lines; default 10.
        save_every: optimizer steps between checkpoints; default 0: once an epoch.
        keep: how many of the newest checkpoints stay; default 2.
        device: "auto" (default) uses GPUs if there are any; "cpu" does not.
        out: folder of the run; default "runs/recipe".
    """

    global_batch: Annotated[int, POSITIVE] = 64
    precision: Annotated[str, OneOf(PRECISIONS)] = "auto"
    policy: Annotated[str, POLICY] = "mesa8"
    seed: Annotated[int, NOT_NEGATIVE] = 0
    log_every: Annotated[int, POSITIVE] = 10
    save_every: Annotated[int, NOT_NEGATIVE] = 0
    keep: Annotated[int, POSITIVE] = 2
    device: Annotated[str, OneOf(("auto", "cpu"))] = "auto"
    out: str = "runs/recipe"


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run.

    Attributes:
        epochs: default 10.
        evaluate_every: epochs between evaluations; default 1. The last epoch has one.
    """

    epochs: Annotated[int, POSITIVE] = 10
    evaluate_every: Annotated[int, POSITIVE] = 1


def check_schedule(config: Any) -> None:
    """Raise ConfigError if the warm-up is not shorter than the run."""
    if config.optim.warmup_epochs >= config.train.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} must be fewer than "
            f"train.epochs={config.train.epochs}"
        )


def check_out(out: str, field: str = "train.out") -> None:
    """Raise ConfigError if the folder `out` cannot be written.

    Args:
        out: the folder, which may be missing.
        field: of the configuration, for the message.
    """
    path = Path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"{field}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{field}: {there} may not be written to")
