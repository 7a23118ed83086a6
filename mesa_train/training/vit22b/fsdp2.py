"""The FSDP2 backend: one optimizer step on one process, with tensor parallelism if it is configured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint as checkpoints
from .backend import (
    _COMMUNICATION,
    average_of,
    build,
    install,
    load_weights,
    optimizer_of,
)
from .config import Config, accumulation


class FSDP2Backend:
    """One process, or FSDP2 (with or without tensor parallelism) over all processes.

    Args:
        config: of the run.
        classes: number of classes.
        sharded: use FSDP2.
    """

    def __init__(self, config: Config, classes: int, sharded: bool) -> None:
        from mesa_train.models.vit22b import init as vit22b_init
        from mesa_train.models.vit22b import parallel as vit22b_parallel
        from mesa_train.models.vit22b import sequence_parallel as vit22b_tokens

        train = config.train
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        place = f"{kind}:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind
        self.device = torch.device(place)
        self.config, self.rank, self.data_rank, self.data_ranks = config, 0, 0, 1
        self.finish = vit22b_parallel.finish_gradients
        # FSDP casts gathered weights to bfloat16 itself. A model on one process uses autocast.
        half = train.precision == "bf16"
        self.autocast = half and not sharded
        model = build(config, classes, "meta")
        if sharded:
            if kind == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group(_COMMUNICATION[kind])
            mesh = vit22b_parallel.mesh_of(kind, dist.get_world_size(), train.tensor_parallel)
            accumulation(train, mesh["dp"].size())
            if train.async_tensor_parallel:
                vit22b_tokens.check_overlap(mesh["tp"])
            vit22b_parallel.sharded(
                model,
                mesh,
                device=str(self.device),
                seed=train.seed,
                head_bias=config.model.head_bias,
                sequence=train.sequence_parallel,
                compute=torch.bfloat16 if half else None,
                reshard=train.reshard,
                offload=train.offload,
            )
            self.rank = dist.get_rank()
            self.data_rank, self.data_ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
        else:
            accumulation(train, 1)
            model.to_empty(device=self.device)
            vit22b_init.initialise(model, train.seed, config.model.head_bias)
        self.accumulate = accumulation(train, self.data_ranks)
        if config.model.weights:
            load_weights(config, model)
        self.model: Any = install(model, train.policy, train.checkpointing)
        if sharded and train.async_tensor_parallel:
            vit22b_tokens.overlapped(self.model, mesh["tp"])
        self.optimizer = optimizer_of(config, self.model)
        self.average = average_of(config, self.model)
        self.pending = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a micro-batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(images)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients. The last micro-batch reduces them over the ranks."""
        self.pending += 1
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(self.pending == self.accumulate)
        (loss / self.accumulate).backward()

    def step(self, lr: float) -> float:
        """Clip the gradients and take an optimizer step. Returns the norm before clipping."""
        norm = self.finish(self.model, self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = 0
        return norm.item()

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a checkpoint from all ranks."""
        further = None if self.average is None else self.average.save
        return checkpoints.save(folder, self.model, self.optimizer, state, further)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Read a checkpoint. Returns its state."""
        return checkpoints.load(checkpoint, self.model, self.optimizer)

    def close(self) -> None:
        """End the process group."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
