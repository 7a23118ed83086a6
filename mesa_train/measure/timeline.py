"""Count the bytes that are live at every moment of a step, without running the step.

Forward, loss and backward run on fake tensors (no data, no memory). Every storage that an operator
makes is counted until it is freed. So the peak contains the working set of the backward: decoded
copies, rebuilt matmuls, a checkpointed block's second forward, and the gradients computed so far.
Three things are not counted:

* static bytes: parameters, buffers, inputs, optimizer states;
* workspace: the memory that a kernel allocates inside itself and frees before it returns;
* stashes that a policy offloaded to CPU memory.

Cost: one to a few seconds for a ViT, for any size and batch.

`module_hooks` calls a listener when a module's forward begins and when the gradient of its output
arrives. The time between two of these calls is a moment of the step. `peak.py` measures the same
moments in a real run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mesa_train.kernels.short_attention import workspace_bytes
from mesa_train.methods.apply import applied
from mesa_train.policy import Policy
from mesa_train.stash.offload import through

from .fake_tensors import FakeModel
from .footprint import counted
from .isolation import isolated
from .stash_log import StashLog
from .step import arguments, autocasting, default_loss, device_of, tensors_in


@dataclasses.dataclass(frozen=True)
class Moment:
    """The time from a module's forward or backward to the next moment.

    Args:
        phase: "forward" or "backward".
        module: qualified name of the module.
        peak_bytes: most bytes live in the moment.
        stored: number of stashes that exist then, counted in the order of the forward (see
            `StashLog`).
        gradient_bytes: bytes of the parameters' gradients that exist when the moment begins.
    """

    phase: str
    module: str
    peak_bytes: int
    stored: int = 0
    gradient_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The moments of one step in order.

    Args:
        moments: in the order of the step.
        gradient_bytes: bytes of the gradients that exist after the step.
    """

    moments: tuple[Moment, ...]
    gradient_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most bytes live at once, beyond the bytes that exist before and after the step."""
        return max(moment.peak_bytes for moment in self.moments)

    @property
    def working_bytes(self) -> int:
        """Most bytes live at once, without the parameters' gradients."""
        return max(moment.peak_bytes - moment.gradient_bytes for moment in self.moments)

    @property
    def peak(self) -> Moment:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: moment.peak_bytes)


def timeline(
    model: nn.Module,
    inputs: Any,
    *,
    policy: Policy | str | None = None,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    log: StashLog | None = None,
    backward: bool = True,
) -> Timeline:
    """Count a step of `model(inputs)` with `policy`; the model does not change.

    The fake tensors stand for CPU tensors, because the autograd engine needs a real GPU for fake
    GPU tensors.

    Args:
        model: as for `footprint`.
        inputs: as for `footprint`.
        policy: as for `footprint`.
        autocast: as for `footprint`.
        loss: from the output to a scalar; default: `default_loss`.
        log: takes the place of the report of the wrapped model, and counts the stashes.
        backward: False runs the forward alone, without a graph.

    Returns:
        A `Timeline`.

    Raises:
        ValueError: as for `footprint`.
        TypeError: as for `footprint`.
    """
    args, kwargs = arguments(inputs)
    fake_model = FakeModel(torch.device("cpu"))
    args, kwargs = fake_model.of(args), fake_model.of(kwargs)
    offload_stream = counted(device_of(model), fake_model.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(model, policy))
        stack.enter_context(isolated(model, fake_model))
        stack.enter_context(through(offload_stream))
        if log is not None:
            log.installed(model)
        existing = (*model.parameters(), *model.buffers(), *tensors_in((args, kwargs)))
        live = _Live(existing, log, list(model.parameters()))
        stack.enter_context(module_hooks(model, live))
        stack.enter_context(torch.set_grad_enabled(backward))
        with live:
            with autocasting(torch.device("cpu"), autocast):
                value = model(*args, **kwargs)
                value = (loss or default_loss)(value) if backward else value
            if backward:
                live.arrive("", live.stored())
                # Not value.backward(): the function mode of the fake tensors is off inside it.
                torch.autograd.backward(value)
        del value
        live.close()
        gradients = {
            parameter.grad.untyped_storage()._cdata: parameter.grad.untyped_storage().nbytes()
            for parameter in model.parameters()
            if parameter.grad is not None
        }
    return Timeline(tuple(live.moments), sum(gradients.values()))


class _Live(TorchDispatchMode):
    """Counts the storages that operators make while the mode is on, except `known` storages."""

    def __init__(
        self, existing: tuple[Tensor, ...], log: StashLog | None, parameters: list[nn.Parameter]
    ) -> None:
        super().__init__()
        self._parameters, self._gradients = parameters, 0
        self.bytes = self.highest = 0
        self.moments: list[Moment] = []
        self._moment = (FORWARD, "", 0)
        self._backward = False
        self._log = log
        # Holding the storages keeps their addresses unique.
        self._existing = {t.untyped_storage()._cdata: t.untyped_storage() for t in existing}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if func.name() == "mesa_train::short_attention_backward":
            self.highest = max(self.highest, self.bytes + workspace_bytes(*args[:4]))
        return output

    def stored(self) -> int:
        """Number of existing stashes: all made so far in the forward, fewer in the backward."""
        if self._backward or self._log is None:
            return self._moment[2]
        return len(self._log.stored)

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        if self._log is not None and not self._backward:
            self._log.begins(module)
        self._mark(FORWARD, module, self.stored())

    def leave(self, module: str) -> int:
        """A module's forward ends; return the number of stashes."""
        if self._log is not None and not self._backward:
            self._log.ends(module)
        return self.stored()

    def arrive(self, module: str, stored: int) -> None:
        """The gradient of a module's output arrives."""
        self._mark(BACKWARD, module, stored)
        self._backward = True
        if self._log is not None:
            self._log.closed = True

    def _mark(self, phase: str, module: str, stored: int) -> None:
        """End the current moment and begin the next."""
        self.close()
        self._moment = phase, module, stored

    def close(self) -> None:
        """End the current moment. In a forward moment stashes are added while it lasts."""
        phase, module, _ = self._moment
        self.moments.append(Moment(phase, module, self.highest, self.stored(), self._gradients))
        self.highest = self.bytes
        if self._backward:
            gradients = [
                parameter.grad for parameter in self._parameters if parameter.grad is not None
            ]
            self._gradients = sum(g.nbytes for g in gradients)

    def _add(self, tensor: Tensor) -> None:
        """Count a new storage."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._existing or address in self._alive or tensor.device.type == "meta":
            return  # Tensors offloaded to CPU memory are on the meta device.
        size = storage.nbytes()
        self._alive[address] = weakref.ref(storage, functools.partial(self._free, address, size))
        self.bytes += size
        self.highest = max(self.highest, self.bytes)

    def _free(self, address: int, size: int, _: Any) -> None:
        """Count a freed storage."""
        del self._alive[address]
        self.bytes -= size


FORWARD, BACKWARD = "forward", "backward"


class StepListener(Protocol):
    """The calls that `module_hooks` makes."""

    def enter(self, module: str) -> None:
        """A module's forward begins: for the first time, or again in a checkpoint's recompute."""

    def leave(self, module: str) -> Any:
        """A module's forward ends; the return value is passed to `arrive`."""

    def arrive(self, module: str, stored: Any) -> None:
        """The gradient of a module's output arrives."""


@contextlib.contextmanager
def module_hooks(model: nn.Module, listener: StepListener) -> Iterator[None]:
    """Within the context, call a listener at the forwards and backwards of `model`'s modules.

    Args:
        model: the module.
        listener: the listener.
    """
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            enter, leave = _hooks(listener, name)
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _hooks(listener: StepListener, name: str) -> tuple[Any, Any]:
    """The forward hooks of one module."""

    def enter(*_: Any) -> None:
        listener.enter(name)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        stored = listener.leave(name)
        # On the graph node: a hook on the tensor keeps a Linear from fusing with its layer scale.
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: listener.arrive(name, stored))
                return

    return enter, leave
