"""Model states of sharded training, by arithmetic: weights, gradients and optimizer states of one
GPU, and of one machine's main memory.

DeepSpeed keeps 16-bit weights and gradients, and float32 gradients, weights and moments for the
optimizer; what it adds up to is what its own `estimate_zero*_model_states_mem_needs` say. FSDP2
keeps float32 weights, gradients and moments, all sharded, and gathers 16-bit weights of a block at
a time. DDP keeps everything on every GPU.
"""

from __future__ import annotations

import dataclasses

# DeepSpeed's own allowance for its buffers in main memory.
BUFFERS = 1.5
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
OFFLOADS = ("none", "cpu", "nvme")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """gpus: in all. nodes: machines that they are spread over evenly. gpu_memory, cpu_memory: bytes
    of a GPU and of a machine. tensor_parallel: GPUs that share a layer."""

    gpus: int
    gpu_memory: int
    cpu_memory: int
    nodes: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for field in ("gpus", "nodes", "tensor_parallel"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.gpus % self.nodes:
            raise ValueError(f"gpus={self.gpus} do not spread evenly over nodes={self.nodes}")
        if self.gpus % self.tensor_parallel:
            raise ValueError(
                f"gpus={self.gpus} is no multiple of tensor_parallel={self.tensor_parallel}"
            )

    @property
    def per_node(self) -> int:
        """GPUs of a machine."""
        return self.gpus // self.nodes


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts of elements. trained, frozen: of all parameters. largest: of the module with the most
    of its own; block: of the repeated block with the most. frozen_bytes: as they lie on a GPU (two
    bytes an element, or NF4 codes). moments_bytes: of the optimizer, for the trained ones."""

    trained: int
    frozen: int
    largest: int
    block: int
    frozen_bytes: int
    moments_bytes: int
    buffers_bytes: int = 0

    @property
    def total(self) -> int:
        """All elements."""
        return self.trained + self.frozen


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes on one GPU: weights, gradients, optimizer (master weights included), gathered (what a
    sharded layer is put together in). cpu: bytes of one machine's main memory; disk: on its NVMe."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    cpu: int = 0
    disk: int = 0

    @property
    def gpu(self) -> int:
        """Bytes of one GPU."""
        return self.weights + self.gradients + self.optimizer + self.gathered


def states(strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    """The model states of a strategy.

    strategy: of `STRATEGIES`. offload: of `OFFLOADS`; with zero3 and fsdp2 the weights go too.

    Raises ValueError for another one, and for an offload that the strategy does not have.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload == "nvme" and strategy != "zero3":
        raise ValueError(f"only zero3 offloads to NVMe, got {strategy}")
    if offload != "none" and strategy == "ddp":
        raise ValueError("ddp has nothing to offload; choose zero1, zero2, zero3 or fsdp2")
    return {"ddp": _ddp, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp2": _fsdp2}[
        strategy
    ](strategy, offload, own, cluster)


def _ddp(_strategy: str, _offload: str, own: Parameters, cluster: Cluster) -> States:
    # Reduction buckets are a second copy of the gradients, unless they are the gradients.
    copies = 2 if cluster.gpus > 1 else 1
    weights = 4 * own.trained + own.frozen_bytes + own.buffers_bytes
    return States(weights, 4 * copies * own.trained, own.moments_bytes, 0)


def _zero12(strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    """zero2 as DeepSpeed's estimate_zero2_model_states_mem_needs; zero1 keeps whole gradients."""
    ranks, trained = cluster.gpus, own.trained
    weights = 2 * trained + own.frozen_bytes + own.buffers_bytes
    whole = 2 * trained if strategy == "zero1" else 0
    if offload == "cpu":
        # float32 weights, gradients and moments of all ranks of a machine, or what loading needs.
        shared = 8 * trained + own.moments_bytes
        cpu = int(max(4 * ranks * own.total, shared) * BUFFERS)
        return States(weights, whole, 0, 0, cpu)
    gradients = whole + (4 * trained) // ranks + ((2 * trained) // ranks if not whole else 0)
    optimizer = (4 * trained + own.moments_bytes) // ranks
    if strategy == "zero2":
        # As DeepSpeed counts: 18 bytes an element are spread, 16-bit gradients and a float32 copy
        # of them among these.
        gradients = (18 * trained) // ranks - (12 * trained) // ranks
        optimizer = (12 * trained) // ranks - (8 * trained - own.moments_bytes) // ranks
    cpu = int(own.total * 4 * cluster.per_node * BUFFERS)
    return States(weights, gradients, optimizer, 0, cpu)


def _zero3(_strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    """As DeepSpeed's estimate_zero3_model_states_mem_needs with zero.Init and, where offloaded,
    both optimizer and parameters in main memory or on NVMe."""
    ranks, trained = cluster.gpus, own.trained
    gathered = 4 * own.largest
    if offload != "none":
        spread = 10 * trained + own.frozen_bytes + own.moments_bytes
        away = int(spread / cluster.nodes * BUFFERS)
        if offload == "cpu":
            return States(own.buffers_bytes, 0, 0, gathered, cpu=away)
        # Pinned buffers for what is on its way, twice the largest layer in float32 states.
        cpu = int(2 * 16 * own.largest * cluster.per_node)
        return States(own.buffers_bytes, 0, 0, gathered, cpu=cpu, disk=away)
    weights = (2 * trained + own.frozen_bytes) // ranks
    spread = (10 * trained + own.frozen_bytes + own.moments_bytes) // ranks
    gradients = (4 * trained) // ranks
    cpu = int(own.largest * 4 * cluster.per_node * BUFFERS)
    optimizer = spread - weights - gradients
    return States(weights + own.buffers_bytes, gradients, optimizer, gathered, cpu)


def _fsdp2(_strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    ranks = cluster.gpus
    # The 16-bit weights of two blocks (one is fetched ahead), and one's gradients, of this rank's
    # part of the layers.
    gathered = 3 * 2 * own.block // cluster.tensor_parallel
    weights = (4 * own.trained + own.frozen_bytes) // ranks
    gradients = 4 * own.trained // ranks
    optimizer = own.moments_bytes // ranks
    if offload == "cpu":
        cpu = (weights + gradients + optimizer) * cluster.per_node
        return States(own.buffers_bytes, 0, 0, gathered, cpu)
    return States(weights + own.buffers_bytes, gradients, optimizer, gathered)
