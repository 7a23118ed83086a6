"""Sharded parameters: support for DeepSpeed ZeRO-3 and FSDP2 in the engine.

Both free a parameter after a module's forward, and gather it again just before that module's
backward. Another module may rebuild a stash that needs the parameter while it is freed. Examples
are a norm's output in the Linear behind it, and a Linear's output in the attention behind it.

- ZeRO-3 marks its parameters. So a freed parameter is gathered for the moment. This takes one more
  collective, in the same order on every rank. Norms' parameters are below ZeRO-3's default
  persistence threshold and are never freed.
- FSDP2's parameters have no mark. So a lineage ends at the boundary of an FSDP module
  (`is_fsdp_module`).

ZeRO-3 also replaces `torch.nn.functional.linear` by a function that no mode can see.
`engine.intercept.unhide_linear` bypasses the replacement while a mode is active. ZeRO-3 also passes
every module's inputs and outputs through its own functions, which return new tensor objects
(`is_zero3_alias`).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

_RELAYS = ("PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward")


def partitioned(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The ZeRO-3 parameters among `tensors`, None for each other tensor; () if there are none."""
    for tensor in tensors:
        if hasattr(tensor, "ds_status"):
            return tuple([t if hasattr(t, "ds_status") else None for t in tensors])
    return ()


def gather_if_partitioned(tensor: Tensor, parameter: Any) -> Tensor:
    """The full ZeRO-3 parameter.

    Args:
        tensor: the tensor that autograd saved. It is returned if it is complete.
        parameter: the ZeRO-3 parameter, which is gathered if it is freed.
    Returns:
        A tensor with all elements of the parameter.
    """
    if tensor.numel() == parameter.ds_numel:
        return tensor
    if parameter.ds_status.name == "AVAILABLE":
        return parameter.detach()
    return _gathered(parameter)


def _gathered(parameter: Any) -> Tensor:
    """Gather a ZeRO-3 parameter from the shards of all ranks.

    DeepSpeed's own bookkeeping is not used, because DeepSpeed may be about to gather the parameter
    too.
    """
    import torch.distributed as dist

    group = parameter.ds_process_group
    shard = parameter.ds_tensor
    if shard.status.name != "AVAILABLE":
        raise RuntimeError(
            "mesa_train: a ZeRO-3 parameter is needed while it is offloaded to NVMe. Set "
            'recompute="none" in the policy, or offload to the CPU.'
        )
    shard = shard.data.to(parameter.device).reshape(-1)
    world = dist.get_world_size(group)
    whole = torch.empty(world * shard.numel(), dtype=shard.dtype, device=shard.device)
    dist.all_gather_into_tensor(whole, shard, group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def local_shard(parameter: Any) -> Tensor:
    """The part of a parameter that this process always holds: its own shard if it is sharded."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None and shard.status.name == "AVAILABLE":
        return shard.data
    return getattr(parameter, "_local_tensor", parameter)


def zero3_hooked(module: nn.Module | None) -> bool:
    """True if ZeRO-3's hooks pass tensors between the modules of `module`.

    In this case ZeRO-3 has marked the parameters of the modules.
    """
    if module is None or "deepspeed.runtime.zero.parameter_offload" not in sys.modules:
        return False
    return any([hasattr(p, "ds_status") for p in module.parameters()])


def is_zero3_alias(tensor: Tensor) -> bool:
    """True if ZeRO-3's module hooks have made `tensor`, as a detached alias of another tensor.

    With an alias, the backward passes through these hooks.
    """
    return tensor.grad_fn is not None and tensor.grad_fn.name() in _RELAYS


@functools.cache
def is_fsdp_module(kind: type[nn.Module]) -> bool:
    """True if modules of a class are FSDP units.

    The parameters of an FSDP unit are gathered and freed together.
    """
    return any([c.__module__.startswith("torch.distributed.fsdp.") for c in kind.__mro__])
