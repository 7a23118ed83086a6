"""Reasons why a training step cannot be captured in a CUDA graph, checked before anything changes.

Each check reads a fact about the model, the optimizer or the processes. A reason that only shows
while PyTorch captures (a read of the device inside the model) is an error of the capture.

What mesa_train itself reads on the host in a step:

- Running ranges: the step counter compares weights, and the codec tests its averages.
- Offload: copies to CPU memory; `stash/offload.py` refuses them during a capture.

All other operators, codecs and kernels read no value of the device on the host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.engine.bound import entry_of
from mesa_train.stash.sharded_parameters import is_fsdp_module

# PyTorch's notes on CUDA graphs ask for this many eager iterations of DDP before a capture.
DDP_WARMUP = 11
_NCCL = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class CaptureError(RuntimeError):
    """A training step cannot be captured. The message names the reason and the remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"capture_step: {reason}")


def the_device(model: nn.Module) -> torch.device:
    """The one device of the model's parameters and buffers.

    Raises:
        CaptureError: there are several devices, or none.
    """
    places: dict[torch.device, str] = {}
    for name, tensor in _tensors(model):
        places.setdefault(tensor.device, name)
    if not places:
        raise CaptureError("the model has no parameters")
    if len(places) > 1:
        named = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise CaptureError(f"the model is on several devices ({named}); move it to one GPU")
    return next(iter(places))


def check_cuda(device: torch.device) -> None:
    """Raise CaptureError if `device` has no CUDA graphs."""
    if not torch.cuda.is_available():
        raise CaptureError(
            "PyTorch sees no CUDA device; CUDA graphs need an NVIDIA GPU, train without a capture"
        )
    if device.type != "cuda":
        raise CaptureError(f"the model is on {device.type}; move it with model.to('cuda') first")


def check_model(model: nn.Module, accumulate: int) -> None:
    """Raise CaptureError if a step of the model reads the device on the host or is distributed.

    Args:
        model: the model, wrapped by mesa_train or plain.
        accumulate: micro-batches in an optimizer step.
    """
    _check_parallel(model, accumulate)
    if not any(p.requires_grad for p in model.parameters()):
        raise CaptureError("no parameter of the model needs a gradient")
    for module in model.modules():
        entry = entry_of(module)
        if entry is None:
            continue
        policy = entry.installed.policy
        if "running" in (policy.ranges, *(c.get("ranges") for c in policy.overrides.values())):
            raise CaptureError(
                "the policy has ranges='running' (preset paper), which compares weights on the "
                "host in every step; choose another preset, such as mesa8"
            )
        if any(rule.enabled and rule.offload for rule in entry.context.rules.table.values()):
            where = "" if policy.offload else f" for {entry.context.name}"
            raise CaptureError(
                f"the policy has offload=True{where}, whose copies a CUDA graph cannot hold; "
                "choose a preset without +offload"
            )


def check_optimizer(optimizer: Any, scaler: Any, in_graph: bool | None) -> bool:
    """True if the optimizer's step goes into a graph.

    Args:
        optimizer: a `torch.optim.Optimizer`, or None.
        scaler: an enabled GradScaler, or None.
        in_graph: the user's choice; None: if it is possible.
    Raises:
        CaptureError: the user wants it and it is not possible.
    """
    reason = None
    if optimizer is None:
        reason = "there is no optimizer; pass optimizer=..."
    elif scaler is not None:
        reason = (
            "a GradScaler decides in Python about the optimizer's step; leave optimizer_in_graph "
            "out, or train in bfloat16 without a scaler"
        )
    elif not all(group.get("capturable") for group in optimizer.param_groups):
        reason = (
            f"{type(optimizer).__name__} is not capturable; make it with capturable=True if it has "
            "this argument, or leave optimizer_in_graph out"
        )
    if in_graph and reason is not None:
        raise CaptureError(f"optimizer_in_graph=True, but {reason}")
    return reason is None and in_graph is not False


def is_ddp(model: nn.Module) -> bool:
    """True if the model is wrapped in DistributedDataParallel."""
    return isinstance(model, nn.parallel.DistributedDataParallel)


def _check_parallel(model: nn.Module, accumulate: int) -> None:
    """Raise CaptureError for a parallel model whose step cannot be captured."""
    deepspeed = sys.modules.get("deepspeed")
    if isinstance(model, nn.DataParallel):
        raise CaptureError("DataParallel copies the model in each step; use one GPU or DDP")
    if deepspeed is not None and isinstance(model, getattr(deepspeed, "DeepSpeedEngine", ())):
        raise CaptureError("DeepSpeed's engine takes its steps in Python; use one GPU or DDP")
    kinds: set[Any] = {type(module) for module in model.modules()}
    if any(is_fsdp_module(kind) for kind in kinds) or any(
        hasattr(p, "ds_status") or hasattr(p, "_local_tensor") for p in model.parameters()
    ):
        raise CaptureError("the parameters are sharded (FSDP, ZeRO-3, DTensor); use one GPU or DDP")
    if not is_ddp(model):
        return
    if model.find_unused_parameters:
        raise CaptureError("DDP has find_unused_parameters=True; a capture needs False")
    if accumulate > 1:
        raise CaptureError("DDP is captured with accumulate=1 only; raise the batch of a process")
    group: Any = model.process_group
    backend = torch.distributed.get_backend(group)
    if backend != "nccl":
        raise CaptureError(f"DDP runs over {backend}; a CUDA graph holds NCCL's collectives only")
    if os.environ.get(_NCCL) != "0":
        raise CaptureError(
            f"set the environment variable {_NCCL}=0 before the process group starts; PyTorch's "
            "watchdog of NCCL disturbs a capture"
        )


def check_batch(batch: tuple[Any, ...], named: dict[str, Any], device: torch.device) -> None:
    """Raise CaptureError unless a batch consists of tensors that need no gradient.

    Args:
        batch: positional arguments of a step.
        named: keyword arguments of a step.
        device: the model's device.
    """
    if not batch and not named:
        raise CaptureError("a step needs a batch; pass its tensors")
    for name, value in (*enumerate(batch), *named.items()):
        where = f"argument {name}" if isinstance(name, int) else f"{name}="
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{where} of the batch is a {type(value).__name__}; a graph reads static tensors, "
                "pass each tensor as an argument of its own"
            )
        if value.requires_grad:
            raise CaptureError(f"{where} of the batch needs a gradient; pass a detached tensor")
        if value.is_sparse or value.is_nested:
            raise CaptureError(f"{where} of the batch is sparse or nested; pass a dense tensor")
    if not torch.is_grad_enabled():
        raise CaptureError("gradients are disabled here; leave torch.no_grad() before the step")
    if torch.is_autocast_enabled(device.type):
        raise CaptureError(
            "the step runs inside torch.autocast, whose cache of weights would be captured; leave "
            "it and pass autocast=torch.bfloat16 to capture_step"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names."""
    yield from model.named_parameters()
    yield from model.named_buffers()
