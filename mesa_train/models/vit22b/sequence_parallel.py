"""Tokens cut over the tensor-parallel ranks: what moves where a rank needs the others' tokens.

With sequence parallelism a rank holds its own tokens between the matmuls of a block, which need all
of them: an all-gather comes before the first, a reduce-scatter behind the second. Together they
move what one sum moves, and each sits beside a matmul, so that PyTorch's asynchronous tensor
parallelism can pass parts while others are multiplied. Tensors are (B, N, D), cut along N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

TOKENS = 1

# Below the functions of torch.distributed._functional_collectives, which were renamed on the way;
# the compiler matches these operators in either release.
_ops = torch.ops._c10d_functional


def gathered(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens, of which every rank uses its own heads' part: their gradients are summed."""
    return _Gather.apply(own, mesh.get_group().group_name, mesh.size())


def scattered(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens of the sum over the ranks."""
    return _Scatter.apply(part, mesh.get_group().group_name, mesh.size())


def cut(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens of what every rank has computed whole. ValueError if they do not divide."""
    if tokens.shape[TOKENS] % mesh.size():
        raise ValueError(
            f"sequence parallelism over {mesh.size()} ranks must divide the "
            f"{tokens.shape[TOKENS]} tokens"
        )
    return _Cut.apply(tokens, mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())


def joined(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens, with which every rank goes on to compute the same."""
    return _Join.apply(own, mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())


def _gather(own: Tensor, group: str, ranks: int) -> Tensor:
    every = _ops.wait_tensor(_ops.all_gather_into_tensor(own.contiguous(), ranks, group))
    return torch.cat(torch.split(every, own.shape[0]), TOKENS)


def _scatter(part: Tensor, group: str, ranks: int) -> Tensor:
    stacked = torch.cat(torch.split(part, part.shape[TOKENS] // ranks, TOKENS))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(stacked, "sum", ranks, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: str, ranks: int) -> Tensor:
        ctx.of = group, ranks
        return _gather(own, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad, *ctx.of), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str, ranks: int) -> Tensor:
        ctx.of = group, ranks
        return _scatter(part, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, *ctx.of), None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.of = group, ranks
        return tokens.chunk(ranks, TOKENS)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grad, *ctx.of), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.of = ranks, rank
        return _gather(own, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, rank = ctx.of
        return grad.chunk(ranks, TOKENS)[rank].contiguous(), None, None, None


def overlapped(model: Any, mesh: DeviceMesh) -> None:
    """Asynchronous tensor parallelism: each block is compiled, and the compiler splits its gather and
    its scatter into parts that travel while others are multiplied.

    Needs tokens that are cut, and CUDA devices that read each other's memory: ValueError otherwise.
    """
    check_overlap(mesh)
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(mesh.get_group().group_name)
    config._micro_pipeline_tp = True
    for block in model.blocks:
        # The forward alone: FSDP's hooks and a checkpoint around it stay as they are.
        block.forward = torch.compile(block.forward)


def check_overlap(mesh: DeviceMesh) -> None:
    """ValueError where the ranks' devices have no symmetric memory."""
    if mesh.device_type != "cuda":
        raise ValueError(
            f"asynchronous tensor parallelism needs CUDA devices with peer access, these are "
            f"{mesh.device_type}; leave train.async_tensor_parallel off"
        )
    if mesh.size() > torch.cuda.device_count():
        raise ValueError(
            f"asynchronous tensor parallelism needs its {mesh.size()} ranks on one machine, this one "
            f"has {torch.cuda.device_count()} CUDA devices"
        )
    own, first = torch.cuda.current_device(), dist.get_rank() - mesh.get_local_rank()
    peers = [(first + i) % torch.cuda.device_count() for i in range(mesh.size())]
    apart = [p for p in peers if p != own and not torch.cuda.can_device_access_peer(own, p)]
    if apart:
        raise ValueError(
            f"asynchronous tensor parallelism needs peer access, which device {own} has not to "
            f"{', '.join(map(str, apart))}"
        )
