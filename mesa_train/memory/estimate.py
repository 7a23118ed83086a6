"""Estimate: what sharded training of a model takes on every GPU, and what fits.

Activations and the working set of the backward come from the model's own forward and backward on
tensors without data, at two batch sizes; model states from `sharding.py`. Nothing is trained, and no
GPU is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mesa_train.memory.checkpointing import NoBlocks, find_blocks
from mesa_train.memory.footprint import footprint
from mesa_train.memory.gradients import default_loss
from mesa_train.memory.inputs import resized
from mesa_train.memory.load import Loaded
from mesa_train.memory.lora import with_lora
from mesa_train.memory.sharding import Cluster, Parameters, States, states
from mesa_train.memory.states import adamw_bytes
from mesa_train.memory.timeline import timeline
from mesa_train.policy import Policy

# CUDA's context, NCCL's buffers and what the caching allocator cannot use.
RESERVE = 2 << 30
OPTIMIZERS = ("adamw", "adamw8bit")
POLICIES = ("plain", "mesa8", "mesa4", "mesa8-recompute", "mesa4-recompute", "checkpoint")
# From the simplest to run to the slowest.
SETUPS = (
    ("ddp", "none"),
    ("zero1", "none"),
    ("zero2", "none"),
    ("fsdp2", "none"),
    ("zero3", "none"),
    ("zero2", "cpu"),
    ("fsdp2", "cpu"),
    ("zero3", "cpu"),
    ("zero3", "nvme"),
)
# Operators on whole tokens, which tensor parallelism does not split.
_ON_TOKENS = frozenset(("layer_norm", "rms_norm", "group_norm", "batch_norm", "checkpoint"))


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of a step beside the model states, by batch size: `fixed + per_image * batch`, of which
    `kept` are stashes and the rest is the working set; `split` is the share that tensor parallelism
    spreads."""

    fixed: int
    per_image: int
    kept_per_image: int
    split: float

    def bytes(self, batch: int, tensor_parallel: int = 1) -> int:
        """Bytes for a batch on one GPU."""
        whole = self.fixed + self.per_image * batch
        return int(whole * (1 - self.split + self.split / tensor_parallel))

    def largest(self, room: int, tensor_parallel: int = 1) -> int:
        """The largest batch that fits `room` bytes; 0 if none does."""
        factor = 1 - self.split + self.split / tensor_parallel
        return max(0, int((room / factor - self.fixed) // max(1, self.per_image)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One way to train: what lies on each GPU at `batch` images a GPU, and the largest batch."""

    strategy: str
    offload: str
    policy: str
    optimizer: str
    lora: int
    states: States
    activations: int
    batch: int
    largest_batch: int
    gpu_bytes: int
    fits: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return dataclasses.asdict(self)


def estimates(
    make: Callable[[], Loaded],
    cluster: Cluster,
    *,
    batch: int,
    policies: Sequence[str | Policy] = POLICIES,
    optimizer: str = "adamw",
    lora: int = 0,
    setups: Sequence[tuple[str, str]] = SETUPS,
    reserve: int = RESERVE,
) -> Iterator[Estimate]:
    """Every setup with every policy, the simplest setup first.

    make: loads the model, with inputs of `batch` images, on the meta device. batch: images a GPU
    that are asked for. optimizer: of `OPTIMIZERS`. lora: rank of LoRA on a model frozen in NF4, 0
    for training all of it. reserve: bytes of a GPU that are not to be had.

    Raises ValueError for an unknown optimizer, and what loading and counting raise.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    own = parameters_of(make().model, optimizer, lora)
    known: dict[tuple[str, bool], Activations | str] = {}
    for strategy, offload in setups:
        held = states(strategy, offload, own, cluster)
        for policy in policies:
            name = policy if isinstance(policy, str) else "policy"
            # Autocast keeps copies of float32 weights; sharded weights are 16-bit already.
            key = (name, strategy == "ddp")
            if key not in known:
                try:
                    known[key] = activations_of(make(), batch, policy, key[1], lora)
                except NoBlocks as error:
                    known[key] = str(error)
            found = known[key]
            if isinstance(found, str):
                continue
            tensor_parallel = cluster.tensor_parallel if strategy == "fsdp2" else 1
            taken = found.bytes(batch, tensor_parallel)
            room = cluster.gpu_memory - reserve - held.gpu
            whole = held.gpu + taken + reserve
            reason = ""
            if held.cpu > cluster.cpu_memory:
                reason = "main memory"
            elif whole > cluster.gpu_memory:
                reason = "GPU memory"
            largest = 0 if held.cpu > cluster.cpu_memory else found.largest(room, tensor_parallel)
            yield Estimate(
                strategy, offload, name, optimizer, lora, held, taken, batch, largest, whole,
                not reason, reason,
            )  # fmt: skip


def parameters_of(model: nn.Module, optimizer: str = "adamw", lora: int = 0) -> Parameters:
    """Counts of a model's parameters; `lora` changes the model as `with_lora` does."""
    frozen_bytes = with_lora(model, lora) if lora else None
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    if frozen_bytes is None:
        frozen_bytes = 2 * sum(p.numel() for p in frozen.values())
    eight = optimizer == "adamw8bit"
    moments = sum(
        adamw_bytes(p.numel(), 4, True) if eight else 8 * p.numel() for p in trained.values()
    )
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    blocks = list(find_blocks(model).values()) or [model]
    return Parameters(
        trained=sum(p.numel() for p in trained.values()),
        frozen=sum(p.numel() for p in frozen.values()),
        largest=largest,
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        frozen_bytes=frozen_bytes,
        moments_bytes=moments,
        buffers_bytes=sum(b.nbytes for b in model.buffers()),
    )


def activations_of(
    loaded: Loaded, batch: int, policy: str | Policy, autocast: bool, lora: int = 0
) -> Activations:
    """What a step takes beside weights, gradients and optimizer states, from two batch sizes."""
    model, inputs = loaded.model, loaded.inputs
    if lora:
        with_lora(model, lora)
    dtype = torch.bfloat16 if autocast else None
    if not autocast:
        model = model.to(torch.bfloat16)
    sizes = []
    for size in (batch, 2 * batch):
        images = resized(inputs, batch, size, data=False)
        if images is None:
            raise ValueError("an input has no batch dimension, so no other batch can be computed")
        if not autocast:
            images = _narrow(images)
        step = timeline(model, images, policy=policy, autocast=dtype)
        sizes.append(step.working_bytes)
        if size == batch:
            found = footprint(model, images, policy=policy, autocast=dtype, loss=default_loss)
    on_tokens = sum(size for name, size in found.by_operator.items() if name in _ON_TOKENS)
    per_image = max(1, (sizes[1] - sizes[0]) // batch)
    return Activations(
        fixed=max(0, sizes[0] - per_image * batch),
        per_image=per_image,
        kept_per_image=found.saved_bytes // batch,
        split=1 - on_tokens / max(1, found.saved_bytes),
    )


def best(found: Sequence[Estimate]) -> Estimate | None:
    """The simplest way that fits: the first setup and, in it, the first policy; None if none."""
    return next((e for e in found if e.fits), None)


def _narrow(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t,
        inputs,
    )
