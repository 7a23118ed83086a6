"""The compression modes that are active in this thread, and their use under torch.compile.

Why: Dynamo can trace a torch function mode, but not a mode that was entered outside the traced
frame. A write to such a mode would outlive the frame, and a second frame would fail on it.

How: no traced frame uses a compression mode from outside. A wrapped module that is traced removes
such modes from the stack and enters a mode of its own. If torch.compile breaks the graph of a
module, the frame of this module runs in Python without a compression mode. The modules inside,
which are traced, each enter a mode of their own.
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
    """Base class of the compression mode.

    `traced`: whether torch.compile traces the frame that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traced = torch.compiler.is_compiling()


def exporting() -> bool:
    """True while torch.export makes a program.

    In PyTorch 2.11, `torch.compiler.is_exporting()` is also true in every frame that torch.compile
    traces. Its flag is right in all versions.
    """
    return torch.compiler._is_exporting_flag


class Owner(Protocol):
    """State shared by the modules of one wrapped model.

    `broken`: its graph break was logged already.
    """

    broken: bool


def innermost() -> Any:
    """The innermost compression mode that is active in this thread, or None.

    In a traced frame, a mode that was entered outside the frame does not count.
    """
    for place in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(place)
        if isinstance(mode, Mode):
            return mode if mode.traced is torch.compiler.is_compiling() else None
    return None


def from_outside() -> list[Any]:
    """In a traced frame: all active modes if a compression mode from outside is among them.

    Otherwise an empty list.
    """
    modes = _get_current_function_mode_stack()
    return modes if any([isinstance(m, Mode) and not m.traced for m in modes]) else []


def only_traced(modes: list[Any]) -> list[Any]:
    """`modes` without the compression modes that were entered outside the traced frame."""
    return [m for m in modes if not isinstance(m, Mode) or m.traced]


def exchange(modes: list[Any]) -> None:
    """Replace the stack of active torch function modes by `modes`."""
    for _ in range(len(_get_current_function_mode_stack())):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Context manager: run without the active compression modes."""
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
    """Remove the compression modes after a graph break, and log the break once.

    Args:
        owner: the state of the wrapped model.
        name: the name of the module in which torch.compile broke the graph.
        module: this module.
    Returns:
        The modes that were active before, for `exchange`.
    """
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
# Returns a function if torch.compile compiles the frames that are called from here. In a frame that
# is not traced, this means a graph break in the frame, or that torch.compile gave the frame up. No
# Python frame of mesa_train may be in between.
tracer = _dynamo.get_eval_frame_callback


def untraced(function: Any, *, inside: bool = True) -> Any:
    """Decorator: torch.compile starts no graph at `function`.

    A graph that starts there would make `torch.compiler.is_compiling()` true inside `function`. A
    traced frame that calls `function` still traces it.

    Args:
        function: the function to mark.
        inside: True (default) also excludes the functions that `function` calls.
    Returns:
        `function`.
    """
    skip, default = _dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT
    strategy = _dynamo._FrameExecStrategy(skip, skip if inside else default)
    _dynamo.set_code_exec_strategy(function.__code__, strategy)
    return function


for _function in (put_aside, exchange, innermost):
    untraced(_function)
