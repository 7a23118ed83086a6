"""Dry run of the open-world recipe: batches, stages, and memory at the worst shape.

It opens no data. Not counted: as for the dense recipes, and the clustering loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mesa_train.methods.apply import PLAIN
from mesa_train.training.dense import dry_run, memory
from mesa_train.utils.formatting import format_bytes

from .build import build, optimizer_of
from .config import Config, stages_of
from .run import stage_lines
from .tasks import classes_of


def report(config: Config, world: int) -> str:
    """The text of the dry run.

    Args:
        config: of the run.
        world: number of processes.
    Raises:
        ConfigError: parts of the configuration do not fit together.
    """
    # A dry run downloads no weights.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))
    shared: Any = dry_run.shared(config, world)  # type: ignore[arg-type]
    classes = classes_of(config.data.tasks)
    count, train = sum(map(len, classes)), shared.train
    choice = dry_run.precision(shared)
    lines = [
        f"faster_rcnn on {config.model.backbone}, {count} classes in {len(classes)} tasks",
        dry_run.batches(shared, world),
        *stage_lines(stages_of(config.optim, len(classes)), classes),
        f"policy {train.policy}, optimizer {config.optim.name}",
        choice.line,
    ]
    size = worst_shape(shared)
    sizes = predicted_memory(shared, count, choice.dtype)
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in sizes.items())
    shape = f"{train.micro_batch} x {size[0]} x {size[1]}"
    lines.append(f"predicted memory at {shape}: {format_bytes(sum(sizes.values()))}: {parts}")
    if train.policy != PLAIN:
        plain = dataclasses.replace(shared, train=dataclasses.replace(train, policy=PLAIN))
        total = sum(predicted_memory(plain, count, choice.dtype).values())
        lines.append(f"plain would need {format_bytes(total)}")
    return "\n".join(lines)


def worst_shape(config: Config) -> tuple[int, int]:
    """The largest height and width of a batch of training pictures, in pixels.

    A batch can hold a wide and a high picture.
    """
    data, alike = config.data, config.train.micro_batch == 1
    sides = memory.scaled_sides(data.short_side, data.long_side, config.augment, alike=alike)
    return memory.padded(sides)


def predicted_memory(config: Config, classes: int, dtype: torch.dtype | None) -> dict[str, int]:
    """Predicted bytes on one device at the worst shape.

    Args:
        config: of the run; `train.micro_batch` images at once.
        classes: of all tasks together.
        dtype: of autocast; None for float32.
    Returns:
        Bytes by use: weights, gradients, activations, images, optimizer.
    """
    model = build(config, classes).train()
    train, size = config.train, worst_shape(config)
    sizes = memory.step_memory(model, train.micro_batch, size, train.policy, dtype)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    moments = 1 if isinstance(optimizer_of(config, model), torch.optim.SGD) else 2
    return {**sizes, "optimizer": moments * trained}
