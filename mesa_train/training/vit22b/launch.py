"""Build the backend that the configuration and the launcher select, after the files are checked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from . import checkpoint as checkpoints
from .backend import Backend, backend_name, build, check_precision
from .config import Config, precision_of
from .fsdp2 import FSDP2Backend
from .zero3 import ZeRO3Backend


def make_backend(config: Config, classes: int, checkpoint: Path | None = None) -> Backend:
    """Build the backend that the configuration and the launcher select.

    Args:
        config: of the run.
        classes: number of classes.
        checkpoint: the checkpoint that will be loaded; None for a new run.
    Raises:
        ConfigError: configuration and launcher do not match.
        CheckpointError: the checkpoint, or the initial weights, are of another model.
    """
    backend = backend_name(config, int(os.environ.get("WORLD_SIZE", "1")))
    name = precision_of(config).name
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=name))
    check_precision(config.train.precision)
    # Check the files before any memory is allocated.
    if config.model.weights:
        sketch, head = build(config, classes, "meta"), config.model.fresh_head
        checkpoints.check_export(Path(config.model.weights), sketch, head)
    if checkpoint is not None:
        checkpoints.check(checkpoint, build(config, classes, "meta"))
    if backend == "zero3":
        return ZeRO3Backend(config, classes)
    return FSDP2Backend(config, classes, sharded=backend == "fsdp2")
