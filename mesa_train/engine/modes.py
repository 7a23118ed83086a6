"""Which interceptions are on in this thread, and which of them torch.compile may see.

Dynamo traces a torch function mode, but not well one that was entered outside of the frame: what is
written to it would outlive the frame, and a second frame fails on it. So no traced frame uses an
interception from outside. A wrapped module that is traced takes such interceptions off the stack and
enters one of its own. Where torch.compile breaks the graph of a module, that module's frame runs in
Python with no interception on; the modules inside, which are traced, enter one each.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

_logger = logging.getLogger(__name__)


class Mode(TorchFunctionMode):
    """Base of the interception. traced: whether it was made in a frame that torch.compile traces."""

    def __init__(self) -> None:
        super().__init__()
        self.traced = torch.compiler.is_compiling()


class Owner(Protocol):
    """What the modules of one wrapped model share. broken: that its graph breaks has been said."""

    broken: bool


def innermost() -> Any:
    """The innermost interception that is on in this thread, or None. In a traced frame, one that was
    entered outside of it does not count."""
    for place in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(place)
        if isinstance(mode, Mode):
            return mode if mode.traced is torch.compiler.is_compiling() else None
    return None


def from_outside() -> list[Any]:
    """In a traced frame: all modes that are on, if an interception entered outside is among them."""
    modes = _get_current_function_mode_stack()
    return modes if any([isinstance(m, Mode) and not m.traced for m in modes]) else []


def only_traced(modes: list[Any]) -> list[Any]:
    """`modes` without the interceptions that were entered outside of the traced frame."""
    return [m for m in modes if not isinstance(m, Mode) or m.traced]


def exchange(modes: list[Any]) -> None:
    """Let `modes` be the torch function modes that are on."""
    for _ in range(len(_get_current_function_mode_stack())):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Context manager: without the interceptions that are on."""
    modes = _get_current_function_mode_stack()
    others = [m for m in modes if not isinstance(m, Mode)]
    if len(others) == len(modes):
        yield
        return
    exchange(others)
    try:
        yield
    finally:
        exchange(modes)


def put_aside(owner: Owner, name: str, module: object) -> list[Any]:
    """Where torch.compile has broken the graph inside `module`: take the interceptions off, and return the modes
    that were on."""
    if not owner.broken:
        owner.broken = True
        _logger.warning(
            "mesa_train: torch.compile breaks the graph inside %s (%s), whose own torch calls keep there what "
            "PyTorch keeps; the modules inside keep codes. TORCH_LOGS=graph_breaks shows the place.",
            name or "the model",
            type(module).__name__,
        )
    modes = _get_current_function_mode_stack()
    exchange([m for m in modes if not isinstance(m, Mode)])
    return modes


_dynamo = torch._C._dynamo.eval_frame
# A function if torch.compile compiles the frames that are called from here. In a frame that is not traced itself,
# this means that it broke a graph there or gave the frame up. No Python frame of ours may be in between.
tracer = _dynamo.get_eval_frame_callback


def untraced(function: Any, *, inside: bool = True) -> Any:
    """Decorator: torch.compile begins no graph at `function`, which would be told that it is being compiled.
    It is still traced where a traced frame calls it.

    inside: nor at the functions that `function` calls.
    """
    skip, default = _dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT
    strategy = _dynamo._FrameExecStrategy(skip, skip if inside else default)
    _dynamo.set_code_exec_strategy(function.__code__, strategy)
    return function


for _function in (put_aside, exchange, innermost):
    untraced(_function)
