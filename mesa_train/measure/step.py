"""Run one step with fixed random numbers: forward, loss and backward of one batch.

A step is timed, and its gradients are compared with other gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time as clock
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs): a mapping is keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def autocasting(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    """Return `torch.autocast` with `dtype` on `device`.

    Args:
        device: device of the forward.
        dtype: torch.bfloat16 or torch.float16; None returns a context that does nothing.

    Raises:
        ValueError: `dtype` is another one.
    """
    if dtype is None:
        return contextlib.nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {dtype}")
    return torch.autocast(device.type, dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model: meta if any part is on meta, else the device of its first tensor.

    The device of a model without tensors is the CPU.
    """
    devices = [t.device for t in (*model.parameters(), *model.buffers())]
    on_meta = [device for device in devices if device.type == "meta"]
    return (on_meta or devices or [torch.device("cpu")])[0]


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield every tensor in an output.

    Args:
        value: an output. Containers, dataclasses and attributes of plain objects are searched.
    """
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
    """Return a float32 scalar of any output: its own loss, cross entropy or a mean square.

    The cross entropy is taken of scores: a first output of shape (batch, classes). Their targets
    are fixed and spread over the classes.

    Raises:
        ValueError: no floating-point tensor of the output requires grad.
    """
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.float()
    outputs = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
    if not outputs:
        raise ValueError(
            "no output of the model requires grad, so there is no gradient to compare (are all "
            "parameters frozen, or does the model return no tensor?)"
        )
    scores = outputs[0].float()
    if scores.dim() == 2 and scores.shape[1] > 1:
        targets = (torch.arange(len(scores), device=scores.device) * 7919) % scores.shape[1]
        return F.cross_entropy(scores, targets)
    return scores.square().mean()


def relative_error(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """The relative L2 distance of two lists of gradients: ||g - r|| / ||r||.

    Args:
        gradients: g, all tensors as one vector; a missing gradient counts as zero.
        reference: r, in the same order.

    Returns:
        The distance; infinite if only the reference is zero.
    """
    distance = norm = 0.0
    for gradient, exact in zip(gradients, reference, strict=True):
        if exact is not None:
            norm += exact.double().square().sum().item()
        if gradient is None and exact is None:
            continue
        difference = (0 if gradient is None else gradient.double()) - (
            0 if exact is None else exact.double()
        )
        distance += torch.as_tensor(difference).square().sum().item()
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return math.sqrt(distance / norm)


def cosine(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> float:
    """The cosine of the angle between two lists of gradients.

    Args:
        gradients: all tensors as one vector; a missing gradient counts as zero.
        reference: in the same order.

    Returns:
        The cosine; 1 if both vectors are zero, 0 if only one is zero.
    """
    product = gradient_norm = norm = 0.0
    for gradient, exact in zip(gradients, reference, strict=True):
        if gradient is not None:
            gradient_norm += gradient.double().square().sum().item()
        if exact is not None:
            norm += exact.double().square().sum().item()
        if gradient is not None and exact is not None:
            product += (gradient.double() * exact.double()).sum().item()
    if gradient_norm == norm == 0:
        return 1.0
    return product / math.sqrt(gradient_norm * norm) if gradient_norm and norm else 0.0


@dataclasses.dataclass(frozen=True)
class Step:
    """Forward, loss and backward of one batch. Each call draws the same random numbers.

    Args:
        device: device of the model.
        autocast: the dtype of autocast; None runs without autocast.
        loss: from the output to a scalar.
    """

    device: torch.device
    autocast: torch.dtype | None
    loss: Callable[[Any], Tensor] = default_loss

    @property
    def scale(self) -> float:
        """Factor on the loss: 2^12 under float16 autocast, else 1.

        As with a GradScaler, the factor keeps small gradients of a mean over a batch from becoming
        zero.
        """
        return 2.0**12 if self.autocast is torch.float16 else 1.0

    def forward(self, module: nn.Module, inputs: Any) -> Tensor:
        """Run the forward and return the loss of one batch.

        Args:
            module: the module to run.
            inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        """
        args, kwargs = arguments(inputs)
        torch.manual_seed(0)
        with autocasting(self.device, self.autocast):
            return self.loss(module(*args, **kwargs))

    def backward(self, module: nn.Module, inputs: Any) -> None:
        """Compute one batch's gradients in the parameters' `.grad`, which must be empty before.

        Args:
            module: the module to run.
            inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        """
        loss = self.forward(module, inputs)
        (loss if self.scale == 1 else loss * self.scale).backward()
        if self.scale != 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def gradients(self, module: nn.Module, inputs: Any) -> list[Tensor | None]:
        """Compute one batch's gradients of the trained parameters; their `.grad` does not change.

        Args:
            module: the module to run.
            inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

        Returns:
            One tensor for each trained parameter; None if the loss does not depend on it.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        loss = self.forward(module, inputs)
        loss = loss if self.scale == 1 else loss * self.scale
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if self.scale == 1:
            return list(gradients)
        return [None if g is None else g / self.scale for g in gradients]

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of a call, with a synchronisation of the device before and after it."""
        self.synchronize()
        start = clock.perf_counter()
        run()
        self.synchronize()
        return clock.perf_counter() - start

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
