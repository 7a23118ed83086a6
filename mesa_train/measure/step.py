"""One step: its arguments, its autocast and device, the loss that begins its backward, and how far its gradients
are from others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs): a mapping is keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def autocasting(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    """`torch.autocast` with `dtype` on `device`; nothing for None; ValueError for another dtype."""
    if dtype is None:
        return contextlib.nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {dtype}")
    return torch.autocast(device.type, dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: meta if any part is, else its first tensor's device, else the CPU."""
    devices = [t.device for t in (*model.parameters(), *model.buffers())]
    meta = [d for d in devices if d.type == "meta"]
    return (meta or devices or [torch.device("cpu")])[0]


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in an output: containers, dataclasses and plain objects are looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from tensors_in(entry)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def default_loss(output: Any) -> Tensor:
    """A float32 scalar of any output: its own loss, cross entropy of scores or a mean square.

    Scores are a first output of shape (batch, classes); the targets are fixed and spread over the
    classes. Raises ValueError if no floating-point tensor of the output requires grad.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own.float()
    outputs = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
    if not outputs:
        raise ValueError(
            "no output of the model requires grad (are all parameters frozen, or does it return "
            "none?), so there is no gradient to compare"
        )
    scores = outputs[0].float()
    if scores.dim() == 2 and scores.shape[1] > 1:
        targets = (torch.arange(len(scores), device=scores.device) * 7919) % scores.shape[1]
        return F.cross_entropy(scores, targets)
    return scores.square().mean()


def relative_error(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """||g - r|| / ||r|| over all tensors as one vector; a missing gradient counts as zero."""
    distance = norm = 0.0
    for own, exact in zip(gradients, reference, strict=True):
        if exact is not None:
            norm += exact.double().square().sum().item()
        if own is None and exact is None:
            continue
        difference = (0 if own is None else own.double()) - (0 if exact is None else exact.double())
        distance += torch.as_tensor(difference).square().sum().item()
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return math.sqrt(distance / norm)


def cosine(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """The cosine of the angle between two lists of tensors as vectors; 1 where both are zero."""
    product = own_norm = norm = 0.0
    for own, exact in zip(gradients, reference, strict=True):
        if own is not None:
            own_norm += own.double().square().sum().item()
        if exact is not None:
            norm += exact.double().square().sum().item()
        if own is not None and exact is not None:
            product += (own.double() * exact.double()).sum().item()
    if own_norm == norm == 0:
        return 1.0
    return product / math.sqrt(own_norm * norm) if own_norm and norm else 0.0
