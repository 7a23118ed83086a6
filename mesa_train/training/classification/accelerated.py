"""Accelerate setup of a run: the accelerator, the trackers, and texts gathered from all ranks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from mesa_train.training.config_schema import ConfigError

from .config import Config
from .dry_run import Plan, precision, use_cpu

_log = logging.getLogger(__name__)


def accelerator(config: Config, plan: Plan) -> Any:
    """Build Accelerate's accelerator for a plan.

    The data loader is not prepared by Accelerate. The accelerator therefore gets batch size and
    accumulation as plain numbers.

    Raises:
        ConfigError: the device does not support the precision.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    train = config.train
    options: dict[str, Any] = {}
    if train.tracker != "none" and _installed(train.tracker):
        options = {"log_with": train.tracker}
    try:
        made = Accelerator(
            cpu=use_cpu(config),
            mixed_precision=precision(config).name,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=plan.accumulation, sync_with_dataloader=False
            ),
            project_config=ProjectConfiguration(project_dir=train.out, logging_dir=train.out),
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"train.precision={train.precision}: {error}") from None
    _tell_of_what_is_ignored(made)
    deepspeed = getattr(made.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = train.micro_batch
        deepspeed.deepspeed_config["gradient_accumulation_steps"] = plan.accumulation
        deepspeed.deepspeed_config["gradient_clipping"] = config.optim.clip
    return made


def _tell_of_what_is_ignored(accelerator: Any) -> None:
    """Warn that Accelerate shards nothing on CPUs; Accelerate itself logs nothing."""
    used = str(accelerator.distributed_type).rpartition(".")[2]
    for name in ("DEEPSPEED", "FSDP"):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if asked and used != name and accelerator.is_main_process:
            _log.warning(
                "the launcher's configuration asks for %s, which Accelerate does not use on %s: "
                "nothing is sharded",
                *(name, accelerator.device.type),
            )


@contextlib.contextmanager
def trackers(config: Config, accelerator: Any) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Context manager: start and end a run's trackers. Gives the function that logs to them."""
    started = bool(accelerator.log_with)
    if started:
        values = {
            f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
            for section, fields in config.to_dict().items()
            for key, value in fields.items()
        }
        accelerator.init_trackers("mesa_train", config=values)
    elif config.train.tracker != "none" and accelerator.is_main_process:
        _log.warning("%s is not installed: nothing is tracked", config.train.tracker)
    try:
        yield lambda row, step: accelerator.log(row, step=step) if started else None
    except BaseException:
        # The process group stays open. If it closed, the other ranks would fail at once, and the
        # launcher would end this process before it prints the reason.
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    accelerator.end_training()


def gather(texts: list[str]) -> list[str]:
    """Join the lists of all ranks on every rank. Each rank waits for the others."""
    from accelerate.utils import gather_object

    gathered: list[str] = gather_object(texts)
    return gathered


def _installed(tracker: str) -> bool:
    """True if the tracker's package is installed."""
    import importlib.util

    return importlib.util.find_spec(tracker) is not None
