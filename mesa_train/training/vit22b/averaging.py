"""Averaged weights (Polyak) of a model on any backend: one process, FSDP2, or ZeRO-3.

After each optimizer step, average = d average + (1 - d) weights, with d = min(decay,
(1 + t) / (10 + t)) after t steps. Without that start, the average of a short run would stay close to
the initial weights.

Each rank averages its own shard in float32, so the average costs 4 bytes a parameter over all ranks
and no communication. In a checkpoint, and at the end, it is written like consolidated weights: one
parameter is gathered at a time. Any number of ranks on any backend reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mesa_train.training import disk

from . import checkpoint as checkpoints
from .config import ConfigError

FOLDER = "averaged"


class AveragedWeights:
    """The average of the trained parameters of a model.

    Args:
        model: sharded or not, with its first weights.
        decay: in (0, 1).
    Raises:
        ConfigError: a shard is not in memory, as with weights on NVMe.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shards = {name: local(p).float().clone() for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after an optimizer step. `step` counts from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._trained():
            self.shards[name].lerp_(local(parameter).float(), 1 - keep)

    def values(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield whole averages on the CPU, one at a time. All ranks must take part."""
        parameters = dict(self.model.named_parameters())
        for name in names:
            if name in self.shards:
                yield name, whole(parameters[name], self.shards[name]).cpu()
            else:
                yield from checkpoints.whole_values(self.model, [name])

    def save(self, folder: Path) -> Path:
        """Write `folder/averaged` from all ranks.

        Raises:
            CheckpointError: on all ranks if a file cannot be written.
        """
        return checkpoints.export(folder / FOLDER, self.model, values=self.values)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Read the average of a checkpoint. Without one, the average starts at the model's weights.

        Raises:
            CheckpointError: the average is damaged or of another model.
        """
        source = checkpoint / FOLDER
        if not source.is_dir():
            self.shards = {name: local(p).float().clone() for name, p in self._trained()}
            return
        files = checkpoints.opened(source, self.model)
        for name, parameter in self._trained():
            with disk.reading(source):
                part = shard_of(parameter, files[name].get_slice(name))
            self.shards[name].copy_(part.view_as(self.shards[name]))


def local(parameter: Any) -> Tensor:
    """This rank's shard of a parameter. ConfigError if it is not in memory."""
    if hasattr(parameter, "ds_tensor"):
        shard: Tensor = parameter.ds_tensor
        if not shard.numel() and parameter.ds_numel:
            raise ConfigError(
                "train.ema needs every weight in memory; DeepSpeed offloads weights to NVMe"
            )
        return shard.detach()
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def whole(parameter: Any, shard: Tensor) -> Tensor:
    """The whole tensor of which every rank holds a shard like its shard of `parameter`."""
    if hasattr(parameter, "ds_tensor"):
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, shard.contiguous())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        made = DTensor.from_local(
            shard,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return made.full_tensor()
    return shard


def shard_of(parameter: Any, part: Any) -> Tensor:
    """This rank's shard, read from a slice of a safetensors file."""
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.numel()
        flat = part[:].flatten()
        padded = torch.zeros(size * dist.get_world_size())
        padded[: len(flat)] = flat
        first = dist.get_rank() * size
        return padded[first : first + size]
    if isinstance(parameter, DTensor):
        return part[checkpoints.slices_of(parameter)]
    return part[:]
