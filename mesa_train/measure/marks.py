"""Marks of a step: where a module's forward begins, and where the gradient of its output arrives.

What is counted between two marks is a moment of the step, on tensors without data (`timeline.py`) as in
a real run (`scratch.py`): the same modules in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from .footprint import tensors_in

FORWARD, BACKWARD = "forward", "backward"


class StepListener(Protocol):
    """What is told of the marks."""

    def enter(self, module: str) -> None:
        """A module's forward begins: for the first time, or again in a checkpoint's recompute."""

    def leave(self, module: str) -> Any:
        """A module's forward ends; what it returns comes back in `arrive`."""

    def arrive(self, module: str, left: Any) -> None:
        """The gradient of a module's output has come."""


@contextlib.contextmanager
def module_hooks(model: nn.Module, marked: StepListener) -> Iterator[None]:
    """Within the context the forwards of `model`'s modules, and their backwards, are told."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            enter, leave = _hooks(marked, name)
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _hooks(marked: StepListener, name: str) -> tuple[Any, Any]:
    def enter(*_: Any) -> None:
        marked.enter(name)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        left = marked.leave(name)
        # On the node: a hook on the tensor would keep operators from being recorded together.
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: marked.arrive(name, left))
                return

    return enter, leave
