"""Sharding of ViT-22B with PyTorch's own tools: built on the meta device, sharded, then allocated.

Tensor parallelism (`mesh["tp"]`) gives each rank whole heads: rows of the first matmul and columns
of the second, with their share of the MLP. A block then needs one sum over the ranks in the forward
and one in the backward, half of a sequential block's. Every rank computes norms, embeddings and the
pooling head.

FSDP (`mesh["dp"]`, `fully_shard`) shards the rest over the other ranks, with one unit for each
block. It gathers a block's weights just before the block runs, while the previous block computes.
`docs/internals/vit22b-parallelism.md` describes the overlap, and its relation to the asynchronous
parallel linear operations of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .init import initialise
from .model import ViT22B


def mesh_of(device: str, world: int, tensor_parallel: int = 1) -> DeviceMesh:
    """Build a mesh (dp, tp) over all ranks. ValueError if the ranks do not divide."""
    if tensor_parallel < 1 or world % tensor_parallel:
        raise ValueError(
            f"tensor_parallel={tensor_parallel} must divide the {world} processes; "
            f"start a multiple of {max(tensor_parallel, 1)} processes"
        )
    return init_device_mesh(
        device, (world // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp")
    )


def check_heads(num_heads: int, tensor_parallel: int) -> None:
    """Raise ValueError if a rank would get part of a head."""
    if num_heads % tensor_parallel:
        choices = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"tensor_parallel={tensor_parallel} must divide the {num_heads} heads: "
            f"one of {', '.join(map(str, choices))}"
        )


def shard_heads(model: ViT22B, mesh: DeviceMesh, sequence: bool = False) -> ViT22B:
    """Apply tensor parallelism over a one-dimensional mesh, in place.

    Weights keep their names and global shapes (DTensors). Call this before `shard_parameters`, and
    before the parameters are allocated.

    Args:
        model: on the meta device.
        mesh: one-dimensional.
        sequence: shard the tokens over the ranks too, outside of a block's matmuls.
    Raises:
        ValueError: the heads do not divide.
    """
    block: Any
    check_heads(
        model.blocks[0].in_proj.mlp_bias.numel() // model.blocks[0].in_proj.share, mesh.size()
    )
    for block in model.blocks:
        for module, name, dim in (
            (block.in_proj, "weight", 0),
            (block.in_proj, "mlp_bias", 0),
            (block.out_proj, "weight", 1),
        ):
            weight = getattr(module, name)
            shard = distribute_tensor(weight, mesh, [Shard(dim)])
            setattr(module, name, nn.Parameter(shard, requires_grad=weight.requires_grad))
        block.in_proj.mesh = block.out_proj.mesh = mesh
        block.in_proj.sequence = block.out_proj.sequence = sequence
    model.tokens = mesh if sequence else None
    return model


def shard_parameters(
    model: ViT22B,
    mesh: DeviceMesh,
    *,
    compute: torch.dtype | None = None,
    reshard: bool = True,
    offload: bool = False,
) -> ViT22B:
    """Apply FSDP2 over a one-dimensional mesh, in place.

    Each block and the pooling head is one unit.

    Args:
        model: on the meta device.
        mesh: one-dimensional.
        compute: dtype of gathered weights and of the arithmetic; gradients are reduced in float32.
            Default: the parameters' dtype.
        reshard: free gathered weights after a block's forward and gather them again in its
            backward; default true.
        offload: keep shards, gradients and optimizer states in CPU memory; default false.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if compute is not None:
        options["mp_policy"] = MixedPrecisionPolicy(compute, torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in model.blocks:
        fully_shard(block, **options)
    # The pooling head is as large as a block. In the root's unit it would stay gathered.
    fully_shard(model.attn_pool, **options)
    fully_shard(model, **options)
    return model


def sharded(
    model: ViT22B,
    mesh: DeviceMesh,
    *,
    device: str,
    seed: int,
    head_bias: float = -10.0,
    sequence: bool = False,
    **fsdp: Any,
) -> ViT22B:
    """Shard a model over a mesh (dp, tp), allocate this rank's shards and draw their weights.

    The weights are the same on every mesh.

    Args:
        model: on the meta device.
        mesh: from `mesh_of`.
        device: of the shards.
        seed: of the weights.
        head_bias: bias of the classifier; default -10.
        sequence: as for `shard_heads`.
        fsdp: arguments of `shard_parameters`.
    Raises:
        ValueError: the model is not on the meta device, or the heads do not divide.
    """
    if not all(p.is_meta for p in model.parameters()):
        raise ValueError(
            "build the model under torch.device('meta'), so that no rank allocates all of it"
        )
    if mesh["tp"].size() > 1:
        shard_heads(model, mesh["tp"], sequence)
    shard_parameters(model, mesh["dp"], **fsdp)
    model.to_empty(device="cpu" if fsdp.get("offload") else device)
    initialise(model, seed, head_bias)
    return model


def finish_gradients(model: ViT22B, max_norm: float | None = None) -> Tensor:
    """Complete the gradients after the last backward of a step, clip their norm and return it.

    Under tensor parallelism, a rank has only a part of some gradients. Its gradients of the query
    and key norms' gains depend on its own heads. With sharded tokens, its gradients of the other
    norms and of the output's bias depend on its own tokens. This function sums these gradients over
    the ranks, all blocks at once.

    Args:
        model: sharded or not.
        max_norm: largest norm; default: no clipping.
    Returns:
        The norm over all ranks' shards, before clipping.
    """
    mesh = model.blocks[0].in_proj.mesh
    if mesh is not None:
        gains = [_local_shard(p.grad) for p in _partial(model) if p.grad is not None]
        if gains:
            flat = torch.cat([g.flatten() for g in gains])
            dist.all_reduce(flat, group=mesh.get_group())
            parts = flat.split([g.numel() for g in gains])
            for gain, part in zip(gains, parts, strict=True):
                gain.copy_(part.view_as(gain))
    norm = gradient_norm(model)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                _local_shard(parameter.grad).mul_(scale.to(parameter.grad.device))
    return norm


def _partial(model: ViT22B) -> Iterator[nn.Parameter]:
    """Unsharded parameters whose gradient is only a part on a tensor-parallel rank."""
    block: Any
    for block in model.blocks:
        yield from block.q_norm.parameters()
        yield from block.k_norm.parameters()
        if model.tokens is not None:
            yield from block.in_norm.parameters()
            yield block.out_proj.bias
    if model.tokens is not None:
        yield from model.norm.parameters()


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The L2 norm of all gradients, for any mesh.

    Squares are summed over the mesh dimensions that shard a gradient, and counted once over the
    dimensions that repeat it.
    """
    squares: dict[tuple[Any, ...], Tensor] = {}
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        groups: tuple[Any, ...] = ()
        if isinstance(grad, DTensor):
            groups = tuple(
                grad.device_mesh.get_group(i)
                for i, placement in enumerate(grad.placements)
                if not placement.is_replicate()
            )
        square_sum = _local_shard(grad).float().square().sum()
        squares[groups] = squares.get(groups, torch.zeros_like(square_sum)) + square_sum
    total: Any = 0.0
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    return torch.as_tensor(total).sqrt()


def _local_shard(grad: Tensor | None) -> Tensor:
    """This rank's part of a gradient."""
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad
