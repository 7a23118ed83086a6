"""Estimate the memory of training on every GPU, sharded or on one card, and which ways fit.

Activations and the working set of the backward come from the model's own forward and backward on
fake tensors, at three batch sizes. Model states come from `model_states.py`. Nothing is trained,
and no GPU is needed. `mesa-train estimate` and the predictions of the recipes use this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from mesa_train.loading.model import Loaded
from mesa_train.measure.optimizer_states import (
    IN_BACKWARD,
    OPTIMIZERS,
    adamw_bytes,
    in_backward_bytes,
)
from mesa_train.methods.checkpointing import NoBlocks, find_blocks
from mesa_train.policy import Policy

from .activations import Activations, activations_of, forward_activations
from .lora import with_lora
from .model_states import Cluster, Parameters, States, states

# CUDA's context, NCCL's buffers and memory that the caching allocator cannot use.
RESERVE = 2 << 30
POLICIES = (
    "plain", "mesa8", "mesa6", "mesa4", "mesa8-recompute", "mesa4-recompute", "checkpoint",
    "mesa8+coded", "mesa8+offload",
)  # fmt: skip
# The setups, from the simplest to run to the slowest.
SETUPS = (
    ("ddp", "none"),
    ("zero1", "none"),
    ("zero2", "none"),
    ("fsdp2", "none"),
    ("zero3", "none"),
    ("zero2", "cpu"),
    ("fsdp2", "cpu"),
    ("zero3", "optimizer"),
    ("zero3", "cpu"),
    ("zero3", "nvme"),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A way to train.

    Args:
        strategy: one of `model_states.STRATEGIES`.
        offload: one of `model_states.OFFLOADS`.
        optimizer: one of `OPTIMIZERS`. Optimizers that step in the backward need the strategy
            "in_backward".
        lora: rank of LoRA on a model that is frozen in NF4; 0 trains the whole model.
        half: weights in bfloat16 without float32 copies.

    Raises:
        ValueError: the optimizer is unknown or does not fit the strategy.
    """

    strategy: str = "ddp"
    offload: str = "none"
    optimizer: str = "adamw"
    lora: int = 0
    half: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            choices = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer must be one of {choices}, got {self.optimizer!r}")
        if (self.optimizer in IN_BACKWARD) != (self.strategy == "in_backward"):
            raise ValueError(
                f"the optimizers {', '.join(IN_BACKWARD)}, and no others, need strategy='in_backward', "
                f"got optimizer={self.optimizer!r} with strategy={self.strategy!r}"
            )

    @property
    def autocast(self) -> bool:
        """True if whole float32 weights are on the GPU, so that autocast saves copies of them."""
        return self.strategy == "ddp" and not self.half and not self.lora


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one way to train.

    Args:
        strategy: as for `Setup`.
        offload: as for `Setup`.
        policy: name of the policy.
        optimizer: as for `Setup`.
        lora: as for `Setup`.
        half: as for `Setup`.
        states: bytes of the model states.
        activations: bytes of a step beside the model states, on a GPU.
        batch: images a GPU.
        largest_batch: largest number of images a GPU that fits.
        gpu_bytes: bytes on each GPU, the reserve included.
        fits: whether `batch` images fit.
        reason: "GPU memory" or "CPU memory" if they do not fit.
    """

    strategy: str
    offload: str
    policy: str
    optimizer: str
    lora: int
    half: bool
    states: States
    activations: int
    batch: int
    largest_batch: int
    gpu_bytes: int
    fits: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values."""
        return dataclasses.asdict(self)


class Estimator:
    """Estimates of one model; common parts are counted once.

    Args:
        make: loads the model with inputs of `batch` images on the meta device, a new one with every
            call.
        batch: images a GPU.
        sizes: batches to count at; more batches make `largest_batch` more exact. Default: 1,
            `batch` and twice `batch`.
    """

    def __init__(
        self, make: Callable[[], Loaded], batch: int, sizes: Sequence[int] | None = None
    ) -> None:
        self.make, self.batch = make, batch
        self.sizes = sorted({1, batch, 2 * batch} if sizes is None else set(sizes))
        self._parameters: dict[Any, Parameters] = {}
        self._activations: dict[Any, Activations] = {}

    def parameters(self, setup: Setup) -> Parameters:
        """Counts of the model's parameters as `setup` trains them."""
        key = (setup.optimizer, setup.lora, setup.half)
        if key not in self._parameters:
            self._parameters[key] = parameters_of(
                self.make().model, setup.optimizer, setup.lora, setup.half
            )
        return self._parameters[key]

    def activations(self, setup: Setup, policy: str | Policy) -> Activations:
        """Bytes of a step beside the model states.

        Raises:
            NoBlocks: `policy` checkpoints blocks and the model has none.
        """
        frozen = setup.strategy == "frozen"
        key = ("" if frozen else policy, setup.autocast, setup.lora, frozen)
        if key not in self._activations:
            loaded = self.make()
            if frozen:
                self._activations[key] = forward_activations(loaded, self.batch, self.sizes)
            else:
                self._activations[key] = activations_of(
                    loaded, self.batch, policy, setup.autocast, setup.lora, self.sizes
                )
        return self._activations[key]

    def estimate(
        self,
        setup: Setup,
        policy: str | Policy,
        cluster: Cluster,
        reserve: int = RESERVE,
    ) -> Estimate:
        """Estimate one way to train.

        Args:
            setup: the way to train.
            policy: name of a method, or a Policy.
            cluster: the GPUs and machines.
            reserve: bytes of each GPU that training cannot use.
        """
        model_states = states(setup.strategy, setup.offload, self.parameters(setup), cluster)
        activations = self.activations(setup, policy)
        split = cluster.tensor_parallel if setup.strategy == "fsdp2" else 1
        activation_bytes = activations.bytes(self.batch, split)
        offloaded_per_image = activations.offloaded_per_image * cluster.per_node // split
        free_cpu_memory = cluster.cpu_memory - model_states.cpu
        model_states = dataclasses.replace(
            model_states, cpu=model_states.cpu + offloaded_per_image * self.batch
        )
        gpu_bytes = model_states.gpu + activation_bytes + reserve
        reason = ""
        if model_states.cpu > cluster.cpu_memory:
            reason = "CPU memory"
        elif gpu_bytes > cluster.gpu_memory:
            reason = "GPU memory"
        budget_bytes = cluster.gpu_memory - reserve - model_states.gpu
        largest_batch = activations.largest(budget_bytes, split)
        if offloaded_per_image:
            largest_batch = min(largest_batch, max(0, free_cpu_memory // offloaded_per_image))
        elif reason == "CPU memory":
            largest_batch = 0
        name = policy if isinstance(policy, str) else "policy"
        return Estimate(
            setup.strategy, setup.offload, name, setup.optimizer, setup.lora, setup.half, model_states,
            activation_bytes, self.batch, largest_batch, gpu_bytes, not reason, reason,
        )  # fmt: skip


def estimates(
    make: Callable[[], Loaded],
    cluster: Cluster,
    *,
    batch: int,
    policies: Sequence[str | Policy] = POLICIES,
    optimizer: str = "adamw",
    lora: int = 0,
    half: bool = False,
    setups: Sequence[tuple[str, str]] = SETUPS,
    reserve: int = RESERVE,
) -> Iterator[Estimate]:
    """Estimate every setup with every policy, the simplest setup first.

    Args:
        make: as for `Estimator`.
        cluster: the GPUs and machines.
        batch: as for `Estimator`.
        policies: names of methods, or Policies.
        optimizer: as for `Setup`.
        lora: as for `Setup`.
        half: as for `Setup`.
        setups: (strategy, offload) pairs; ignored for an optimizer that steps in the backward.
        reserve: bytes of each GPU that training cannot use.

    Yields:
        An `Estimate` for each setup and policy. Policies that checkpoint blocks are left out if the
            model has none.

    Raises:
        ValueError: the optimizer is unknown, or loading or counting fails.
    """
    if optimizer in IN_BACKWARD:
        setups = [("in_backward", "none")]
    estimator = Estimator(make, batch)
    for strategy, offload in setups:
        setup = Setup(strategy, offload, optimizer, lora, half)
        for policy in policies:
            with contextlib.suppress(NoBlocks):
                yield estimator.estimate(setup, policy, cluster, reserve)


def parameters_of(
    model: nn.Module, optimizer: str = "adamw", lora: int = 0, half: bool = False
) -> Parameters:
    """Count a model's parameters.

    Args:
        model: the module; `lora` changes it as `with_lora` does.
        optimizer: one of `OPTIMIZERS`.
        lora: rank of LoRA; 0 for none.
        half: weights in bfloat16 without float32 copies.
    """
    frozen_bytes = with_lora(model, lora) if lora else None
    trained = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}.values()
    if frozen_bytes is None:
        frozen_bytes = 2 * sum(p.numel() for p in frozen)
    if optimizer in IN_BACKWARD:
        moments = sum(in_backward_bytes(p.shape, optimizer) for p in trained)
    elif optimizer == "adamw8bit":
        moments = sum(adamw_bytes(p.numel(), 4, True) for p in trained)
    else:
        # torch keeps the moments in the dtype of the weights. SGD with momentum has one.
        moments = (
            (1 if optimizer == "sgd" else 2) * (2 if half else 4) * sum(p.numel() for p in trained)
        )
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    blocks = list(find_blocks(model).values()) or [model]
    return Parameters(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        largest=largest,
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        frozen_bytes=frozen_bytes,
        moments_bytes=moments,
        buffers_bytes=sum(b.nbytes for b in model.buffers()),
        tensor=max((p.numel() for p in trained), default=0),
        half=half,
    )


def best(rows: Sequence[Estimate]) -> Estimate | None:
    """The simplest estimate that fits; None if none fits.

    It is the first policy that fits in the first setup that has one.
    """
    return next((row for row in rows if row.fits), None)
