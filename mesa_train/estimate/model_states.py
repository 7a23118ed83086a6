"""Compute the model states of sharded training: weights, gradients and optimizer states.

They are given for one GPU, and for the CPU memory of one machine. DeepSpeed keeps 16-bit weights
and gradients, and float32 gradients, weights and moments for the optimizer. The sums are equal to
the results of its own `estimate_zero*_model_states_mem_needs`. FSDP2 keeps float32 weights,
gradients and moments, all sharded, and gathers the 16-bit weights of one block at a time. DDP keeps
everything on every GPU. An optimizer in the backward keeps 16-bit weights, one parameter's gradient
and its states. A frozen model keeps 16-bit weights.
"""

from __future__ import annotations

import dataclasses

from mesa_train.measure.optimizer_states import UPDATE

# DeepSpeed's own factor for its buffers in CPU memory.
BUFFERS = 1.5
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "in_backward", "frozen")
OFFLOADS = ("none", "optimizer", "cpu", "nvme")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs and machines.

    Args:
        gpus: number of GPUs in all.
        gpu_memory: bytes of a GPU.
        cpu_memory: bytes of CPU memory of a machine.
        nodes: number of machines; the GPUs are divided evenly among them.
        tensor_parallel: number of GPUs that share a layer.

    Raises:
        ValueError: a number is below 1, or `gpus` is not a multiple of the other numbers.
    """

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
            raise ValueError(f"gpus={self.gpus} must be a multiple of nodes={self.nodes}")
        if self.gpus % self.tensor_parallel:
            raise ValueError(
                f"gpus={self.gpus} must be a multiple of tensor_parallel={self.tensor_parallel}"
            )

    @property
    def per_node(self) -> int:
        """GPUs of a machine."""
        return self.gpus // self.nodes


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of elements and bytes of a model's parameters.

    Args:
        trained: elements of all trained parameters.
        frozen: elements of all frozen parameters.
        largest: most elements that one module has without its submodules.
        block: elements of the largest repeated block.
        frozen_bytes: bytes of the frozen parameters on a GPU (two bytes an element, or NF4 codes).
        moments_bytes: bytes of the optimizer for the trained parameters.
        buffers_bytes: bytes of the buffers.
        tensor: elements of the largest trained parameter.
        half: trained weights are 16-bit, without a float32 copy.
    """

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
        """Elements of all parameters."""
        return self.trained + self.frozen


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes of model states.

    Args:
        weights: on one GPU.
        gradients: on one GPU.
        optimizer: on one GPU, master weights included.
        gathered: on one GPU, for the gathered parameters of a sharded layer.
        cpu: in the CPU memory of one machine.
        disk: on the NVMe of one machine.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    cpu: int = 0
    disk: int = 0

    @property
    def gpu(self) -> int:
        """Bytes on one GPU."""
        return self.weights + self.gradients + self.optimizer + self.gathered


def states(strategy: str, offload: str, counts: Parameters, cluster: Cluster) -> States:
    """Compute the model states of a strategy.

    Args:
        strategy: one of `STRATEGIES`.
        offload: one of `OFFLOADS`. "optimizer" offloads the optimizer and leaves the weights on the
            GPU (only zero3). "cpu" also offloads the weights with zero3 and fsdp2. "nvme" offloads
            both to disk (only zero3).
        counts: counts of the parameters.
        cluster: the GPUs and machines.

    Raises:
        ValueError: the strategy or offload is unknown, or the strategy does not have this offload.
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
        raise ValueError(f"strategy='in_backward' runs on one GPU, got gpus={cluster.gpus}")
    compute = {
        "ddp": _ddp,
        "zero1": _zero12,
        "zero2": _zero12,
        "zero3": _zero3,
        "fsdp2": _fsdp2,
        "in_backward": _in_backward,
        "frozen": _frozen,
    }
    return compute[strategy](strategy, offload, counts, cluster)


def _frozen(_strategy: str, _offload: str, counts: Parameters, _cluster: Cluster) -> States:
    """A frozen model: 16-bit weights and buffers."""
    return States(2 * counts.trained + counts.frozen_bytes + counts.buffers_bytes, 0, 0, 0)


def _in_backward(_strategy: str, _offload: str, counts: Parameters, _cluster: Cluster) -> States:
    """An optimizer that steps in the backward.

    The one gradient that exists is part of the backward's working set. Counted here are the float32
    rows of its update: gradient, new value, and three temporaries of the rounding.
    """
    weights = 2 * counts.trained + counts.frozen_bytes + counts.buffers_bytes
    return States(weights, 5 * 4 * min(UPDATE, counts.tensor), counts.moments_bytes, 0)


def _ddp(_strategy: str, _offload: str, counts: Parameters, cluster: Cluster) -> States:
    """DDP: everything on every GPU."""
    # Reduction buckets are a second copy of the gradients, unless gradients are views of the
    # buckets.
    copies = 2 if cluster.gpus > 1 else 1
    element_bytes = 2 if counts.half else 4
    weights = element_bytes * counts.trained + counts.frozen_bytes + counts.buffers_bytes
    return States(weights, element_bytes * copies * counts.trained, counts.moments_bytes, 0)


def _zero12(strategy: str, offload: str, counts: Parameters, cluster: Cluster) -> States:
    """zero2 as DeepSpeed's estimate_zero2_model_states_mem_needs; zero1 keeps whole gradients."""
    ranks, trained = cluster.gpus, counts.trained
    weights = 2 * trained + counts.frozen_bytes + counts.buffers_bytes
    unsharded_gradients = 2 * trained if strategy == "zero1" else 0
    # Bytes an element beside weights and moments: a float32 weight and gradient, or neither.
    masters = 0 if counts.half else 8
    if offload == "cpu":
        # The optimizer's states of all ranks of a machine, or the memory for loading.
        shared = masters * trained + counts.moments_bytes
        cpu = int(max(4 * ranks * counts.total, shared) * BUFFERS)
        return States(weights, unsharded_gradients, 0, 0, cpu)
    cpu = int(counts.total * 4 * cluster.per_node * BUFFERS)
    if counts.half:
        gradients = unsharded_gradients or 2 * trained // ranks
        return States(weights, gradients, counts.moments_bytes // ranks, 0, cpu)
    gradients = unsharded_gradients + (4 * trained) // ranks
    optimizer = (4 * trained + counts.moments_bytes) // ranks
    if strategy == "zero2":
        # DeepSpeed counts 18 sharded bytes an element, which include 16-bit gradients and a float32
        # copy of them.
        gradients = (18 * trained) // ranks - (12 * trained) // ranks
        optimizer = (12 * trained) // ranks - (8 * trained - counts.moments_bytes) // ranks
    return States(weights, gradients, optimizer, 0, cpu)


def _zero3(_strategy: str, offload: str, counts: Parameters, cluster: Cluster) -> States:
    """ZeRO-3 as DeepSpeed's estimate_zero3_model_states_mem_needs with zero.Init.

    The optimizer is on the GPUs or in CPU memory, with the parameters in CPU memory or on NVMe.
    """
    ranks, trained = cluster.gpus, counts.trained
    gathered = 4 * counts.largest
    # Gradients are 16-bit with a float32 copy, and the optimizer has float32 weights. With 16-bit
    # weights alone there is neither.
    weights, gradients = 2 * trained + counts.frozen_bytes, (2 if counts.half else 4) * trained
    masters = 0 if counts.half else 4 * trained
    if offload == "optimizer":
        sharded = gradients + masters + counts.moments_bytes
        cpu = int(sharded / cluster.nodes * BUFFERS)
        return States(weights // ranks + counts.buffers_bytes, 0, 0, gathered, cpu)
    sharded = weights + gradients + masters + counts.moments_bytes
    if offload != "none":
        offloaded = int(sharded / cluster.nodes * BUFFERS)
        if offload == "cpu":
            return States(counts.buffers_bytes, 0, 0, gathered, cpu=offloaded)
        # Pinned buffers for copies to NVMe: twice the largest layer in float32 states.
        cpu = int(2 * 16 * counts.largest * cluster.per_node)
        return States(counts.buffers_bytes, 0, 0, gathered, cpu=cpu, disk=offloaded)
    cpu = int(counts.largest * 4 * cluster.per_node * BUFFERS)
    optimizer = sharded // ranks - weights // ranks - gradients // ranks
    return States(
        weights // ranks + counts.buffers_bytes, gradients // ranks, optimizer, gathered, cpu
    )


def _fsdp2(_strategy: str, offload: str, counts: Parameters, cluster: Cluster) -> States:
    """FSDP2: everything sharded, and gathered blocks."""
    ranks = cluster.gpus
    # The 16-bit weights of two blocks (one is prefetched) and the gradients of one, for this rank's
    # part of the layers.
    gathered = 3 * 2 * counts.block // cluster.tensor_parallel
    element_bytes = 2 if counts.half else 4
    weights = (element_bytes * counts.trained + counts.frozen_bytes) // ranks
    gradients = element_bytes * counts.trained // ranks
    optimizer = counts.moments_bytes // ranks
    if offload == "cpu":
        cpu = (weights + gradients + optimizer) * cluster.per_node
        return States(counts.buffers_bytes, 0, 0, gathered, cpu)
    return States(weights + counts.buffers_bytes, gradients, optimizer, gathered)
