"""Model states of sharded training, by arithmetic: weights, gradients and optimizer states of one
GPU, and of one machine's CPU memory.

DeepSpeed keeps 16-bit weights and gradients, and float32 gradients, weights and moments for the
optimizer; what it adds up to is what its own `estimate_zero*_model_states_mem_needs` say. FSDP2
keeps float32 weights, gradients and moments, all sharded, and gathers 16-bit weights of a block at
a time. DDP keeps everything on every GPU. Steps in the backward keep 16-bit weights, one parameter's
gradient and what the optimizer has. A frozen model keeps 16-bit weights.
"""

from __future__ import annotations

import dataclasses

from mesa_train.measure.optimizer_states import UPDATE

# DeepSpeed's own allowance for its buffers in CPU memory.
BUFFERS = 1.5
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "in_backward", "frozen")
OFFLOADS = ("none", "optimizer", "cpu", "nvme")


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
    of its own; block: of the repeated block with the most; tensor: of the largest trained parameter.
    frozen_bytes: as they lie on a GPU (two bytes an element, or NF4 codes). moments_bytes: of the
    optimizer, for the trained ones. half: trained weights are 16-bit, without a float32 copy."""

    trained: int
    frozen: int
    largest: int
    block: int
    frozen_bytes: int
    moments_bytes: int
    buffers_bytes: int = 0
    tensor: int = 0
    half: bool = False

    @property
    def total(self) -> int:
        """All elements."""
        return self.trained + self.frozen


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes on one GPU: weights, gradients, optimizer (master weights included), gathered (what a
    sharded layer is put together in). cpu: bytes of one machine's CPU memory; disk: on its NVMe."""

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

    strategy: of `STRATEGIES`. offload: of `OFFLOADS`: "optimizer" leaves the weights on the GPU
    (zero3 alone), "cpu" takes them along with zero3 and fsdp2, "nvme" puts both on disk (zero3).

    Raises ValueError for another one, and for an offload that the strategy does not have.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload == "nvme" and strategy != "zero3":
        raise ValueError(f"only zero3 offloads to NVMe, got {strategy}")
    if offload == "optimizer" and strategy != "zero3":
        raise ValueError(f"only zero3 offloads the optimizer without the weights, got {strategy}")
    if offload != "none" and strategy in ("ddp", "in_backward", "frozen"):
        raise ValueError(f"{strategy} has nothing to offload; choose zero1, zero2, zero3 or fsdp2")
    if strategy == "in_backward" and cluster.gpus > 1:
        raise ValueError(f"steps in the backward are one GPU's, got gpus={cluster.gpus}")
    compute = {
        "ddp": _ddp,
        "zero1": _zero12,
        "zero2": _zero12,
        "zero3": _zero3,
        "fsdp2": _fsdp2,
        "in_backward": _in_backward,
        "frozen": _frozen,
    }
    return compute[strategy](strategy, offload, own, cluster)


def _frozen(_strategy: str, _offload: str, own: Parameters, _cluster: Cluster) -> States:
    return States(2 * own.trained + own.frozen_bytes + own.buffers_bytes, 0, 0, 0)


def _in_backward(_strategy: str, _offload: str, own: Parameters, _cluster: Cluster) -> States:
    """The one gradient that exists is part of the backward's working set. Here are the float32 rows
    of its update: gradient, new value, and three temporaries of the rounding."""
    weights = 2 * own.trained + own.frozen_bytes + own.buffers_bytes
    return States(weights, 5 * 4 * min(UPDATE, own.tensor), own.moments_bytes, 0)


def _ddp(_strategy: str, _offload: str, own: Parameters, cluster: Cluster) -> States:
    # Reduction buckets are a second copy of the gradients, unless they are the gradients.
    copies = 2 if cluster.gpus > 1 else 1
    each = 2 if own.half else 4
    weights = each * own.trained + own.frozen_bytes + own.buffers_bytes
    return States(weights, each * copies * own.trained, own.moments_bytes, 0)


def _zero12(strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    """zero2 as DeepSpeed's estimate_zero2_model_states_mem_needs; zero1 keeps whole gradients."""
    ranks, trained = cluster.gpus, own.trained
    weights = 2 * trained + own.frozen_bytes + own.buffers_bytes
    whole = 2 * trained if strategy == "zero1" else 0
    # Beside weights and moments, bytes an element: a float32 weight and gradient, or neither.
    masters = 0 if own.half else 8
    if offload == "cpu":
        # What the optimizer has of all ranks of a machine, or what loading needs.
        shared = masters * trained + own.moments_bytes
        cpu = int(max(4 * ranks * own.total, shared) * BUFFERS)
        return States(weights, whole, 0, 0, cpu)
    cpu = int(own.total * 4 * cluster.per_node * BUFFERS)
    if own.half:
        gradients = whole or 2 * trained // ranks
        return States(weights, gradients, own.moments_bytes // ranks, 0, cpu)
    gradients = whole + (4 * trained) // ranks
    optimizer = (4 * trained + own.moments_bytes) // ranks
    if strategy == "zero2":
        # As DeepSpeed counts: 18 bytes an element are spread, 16-bit gradients and a float32 copy
        # of them among these.
        gradients = (18 * trained) // ranks - (12 * trained) // ranks
        optimizer = (12 * trained) // ranks - (8 * trained - own.moments_bytes) // ranks
    return States(weights, gradients, optimizer, 0, cpu)


def _zero3(_strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    """As DeepSpeed's estimate_zero3_model_states_mem_needs with zero.Init: the optimizer on the GPUs
    or in CPU memory, with the parameters in CPU memory or on NVMe."""
    ranks, trained = cluster.gpus, own.trained
    gathered = 4 * own.largest
    # Gradients are 16-bit with a float32 copy, the optimizer has float32 weights: neither is there
    # where weights are 16-bit alone.
    weights, gradients = 2 * trained + own.frozen_bytes, (2 if own.half else 4) * trained
    masters = 0 if own.half else 4 * trained
    if offload == "optimizer":
        spread = gradients + masters + own.moments_bytes
        cpu = int(spread / cluster.nodes * BUFFERS)
        return States(weights // ranks + own.buffers_bytes, 0, 0, gathered, cpu)
    spread = weights + gradients + masters + own.moments_bytes
    if offload != "none":
        away = int(spread / cluster.nodes * BUFFERS)
        if offload == "cpu":
            return States(own.buffers_bytes, 0, 0, gathered, cpu=away)
        # Pinned buffers for what is on its way, twice the largest layer in float32 states.
        cpu = int(2 * 16 * own.largest * cluster.per_node)
        return States(own.buffers_bytes, 0, 0, gathered, cpu=cpu, disk=away)
    cpu = int(own.largest * 4 * cluster.per_node * BUFFERS)
    optimizer = spread // ranks - weights // ranks - gradients // ranks
    return States(
        weights // ranks + own.buffers_bytes, gradients // ranks, optimizer, gathered, cpu
    )


def _fsdp2(_strategy: str, offload: str, own: Parameters, cluster: Cluster) -> States:
    ranks = cluster.gpus
    # The 16-bit weights of two blocks (one is fetched ahead), and one's gradients, of this rank's
    # part of the layers.
    gathered = 3 * 2 * own.block // cluster.tensor_parallel
    each = 2 if own.half else 4
    weights = (each * own.trained + own.frozen_bytes) // ranks
    gradients = each * own.trained // ranks
    optimizer = own.moments_bytes // ranks
    if offload == "cpu":
        cpu = (weights + gradients + optimizer) * cluster.per_node
        return States(own.buffers_bytes, 0, 0, gathered, cpu)
    return States(weights + own.buffers_bytes, gradients, optimizer, gathered)
