"""Parameters that come and go: what DeepSpeed ZeRO-3 and FSDP2 need from the engine.

Both free a parameter after a module's forward and gather it again just before that module's backward.
A stash that is rebuilt elsewhere (a norm's output in the Linear behind it, a Linear's output in the
attention behind it) may need the parameter while it is away:

- ZeRO-3 marks its parameters, so an absent one is gathered for the moment: one collective more, in the
  same order on every rank. Norms' parameters are below ZeRO-3's default persistence threshold and never
  leave.
- FSDP2's carry no mark, so a lineage ends where an FSDP is_fsdp_module begins or ends (`is_fsdp_module`).

ZeRO-3 also replaces `torch.nn.functional.linear` by one that no mode can see
(`engine.intercept.unhide_linear` makes the replacement step aside while a mode is on), and passes
every module's inputs and outputs through functions of its own, which give them new names (`is_zero3_alias`).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

_RELAYS = ("PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward")


def partitioned(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The ZeRO-3 parameters among `tensors`, None for the others; () if there are none."""
    for tensor in tensors:
        if hasattr(tensor, "ds_status"):
            return tuple([t if hasattr(t, "ds_status") else None for t in tensors])
    return ()


def gather_if_partitioned(tensor: Tensor, parameter: Any) -> Tensor:
    """A ZeRO-3 parameter whole, given what autograd kept of it: that, unless it is away."""
    if tensor.numel() == parameter.ds_numel:
        return tensor
    if parameter.ds_status.name == "AVAILABLE":
        return parameter.detach()
    return _gathered(parameter)


def _gathered(parameter: Any) -> Tensor:
    """A ZeRO-3 parameter from all ranks' shards, apart from DeepSpeed's own bookkeeping (which may be
    about to gather it too)."""
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
    """What this process holds of a parameter at any time: its own shard, where it is sharded."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None and shard.status.name == "AVAILABLE":
        return shard.data
    return getattr(parameter, "_local_tensor", parameter)


def zero3_hooked(module: nn.Module | None) -> bool:
    """Whether ZeRO-3 passes tensors on between the modules of `module`: it has marked their
    parameters then."""
    if module is None or "deepspeed.runtime.zero.parameter_offload" not in sys.modules:
        return False
    return any([hasattr(p, "ds_status") for p in module.parameters()])


def is_zero3_alias(tensor: Tensor) -> bool:
    """Whether ZeRO-3's hooks around modules have made `tensor`: another tensor's detached self, so that
    the backward passes by them."""
    return tensor.grad_fn is not None and tensor.grad_fn.name() in _RELAYS


@functools.cache
def is_fsdp_module(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are FSDP units, whose parameters are gathered and freed together."""
    return any([c.__module__.startswith("torch.distributed.fsdp.") for c in kind.__mro__])
