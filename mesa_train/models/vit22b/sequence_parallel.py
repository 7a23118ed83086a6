"""Sequence parallelism: tokens sharded over the tensor-parallel ranks, and the transfers it needs.

Between the matmuls of a block, a rank holds only its own tokens. The matmuls need all tokens: an
all-gather runs before the first, a reduce-scatter after the second. Together both transfer as much
as one sum. Each is next to a matmul, so PyTorch's asynchronous tensor parallelism can overlap
transfer and multiplication, part by part. Tensors are (B, N, D), sharded along N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

TOKENS = 1

# These operators are below the functions of torch.distributed._functional_collectives, which were
# renamed between releases. The compiler matches the operators in both releases.
_ops = torch.ops._c10d_functional


def gathered(local_tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens. Every rank uses its own heads' part of them, so the gradients are summed."""
    return _Gather.apply(local_tokens, mesh.get_group().group_name, mesh.size())


def scattered(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens of the sum over the ranks."""
    return _Scatter.apply(part, mesh.get_group().group_name, mesh.size())


def cut(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens of a tensor that every rank has. ValueError if they do not divide."""
    if tokens.shape[TOKENS] % mesh.size():
        raise ValueError(
            f"sequence parallelism over {mesh.size()} ranks must divide the "
            f"{tokens.shape[TOKENS]} tokens"
        )
    return _Cut.apply(tokens, mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())


def joined(local_tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens. Every rank then computes the same with them, so the gradients are not summed."""
    return _Join.apply(
        local_tokens, mesh.get_group().group_name, mesh.size(), mesh.get_local_rank()
    )


def _gather(local_tokens: Tensor, group: str, ranks: int) -> Tensor:
    """All-gather along the tokens."""
    gathered_parts = _ops.wait_tensor(
        _ops.all_gather_into_tensor(local_tokens.contiguous(), ranks, group)
    )
    return torch.cat(torch.split(gathered_parts, local_tokens.shape[0]), TOKENS)


def _scatter(part: Tensor, group: str, ranks: int) -> Tensor:
    """Reduce-scatter along the tokens."""
    stacked = torch.cat(torch.split(part, part.shape[TOKENS] // ranks, TOKENS))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(stacked, "sum", ranks, group))


class _Gather(torch.autograd.Function):
    """All-gather; its backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, local_tokens: Tensor, group: str, ranks: int) -> Tensor:
        ctx.of = group, ranks
        return _gather(local_tokens, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad, *ctx.of), None, None


class _Scatter(torch.autograd.Function):
    """Reduce-scatter; its backward is an all-gather."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str, ranks: int) -> Tensor:
        ctx.of = group, ranks
        return _scatter(part, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, *ctx.of), None, None


class _Cut(torch.autograd.Function):
    """This rank's tokens; the backward is an all-gather."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.of = group, ranks
        return tokens.chunk(ranks, TOKENS)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grad, *ctx.of), None, None, None


class _Join(torch.autograd.Function):
    """All-gather; the backward selects this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, local_tokens: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.of = ranks, rank
        return _gather(local_tokens, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, rank = ctx.of
        return grad.chunk(ranks, TOKENS)[rank].contiguous(), None, None, None


def overlapped(model: Any, mesh: DeviceMesh) -> None:
    """Turn on asynchronous tensor parallelism: compile each block and overlap its transfers.

    The compiler splits the gather and the scatter of a block into parts, and transfers one part
    while it multiplies others.

    Args:
        model: with sharded tokens.
        mesh: the tensor-parallel ranks.
    Raises:
        ValueError: the devices are not CUDA devices that can access each other's memory.
    """
    check_overlap(mesh)
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(mesh.get_group().group_name)
    config._micro_pipeline_tp = True
    for block in model.blocks:
        # Only the forward is compiled: FSDP's hooks and a checkpoint around the block stay
        # unchanged.
        block.forward = torch.compile(block.forward)


def check_overlap(mesh: DeviceMesh) -> None:
    """Raise ValueError if the ranks' devices have no symmetric memory."""
    if mesh.device_type != "cuda":
        raise ValueError(
            f"asynchronous tensor parallelism needs CUDA devices with peer access, got "
            f"{mesh.device_type}; set train.async_tensor_parallel to false"
        )
    if mesh.size() > torch.cuda.device_count():
        raise ValueError(
            f"asynchronous tensor parallelism needs its {mesh.size()} ranks on one machine; this "
            f"machine has {torch.cuda.device_count()} CUDA devices"
        )
    device, first = torch.cuda.current_device(), dist.get_rank() - mesh.get_local_rank()
    peers = [(first + i) % torch.cuda.device_count() for i in range(mesh.size())]
    apart = [p for p in peers if p != device and not torch.cuda.can_device_access_peer(device, p)]
    if apart:
        raise ValueError(
            f"asynchronous tensor parallelism needs peer access; device {device} has none to "
            f"{', '.join(map(str, apart))}"
        )
