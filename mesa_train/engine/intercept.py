"""The compression mode: a TorchFunctionMode that looks up every torch call in one table.

Calls of modules and functional calls both pass through the mode. So no model is forked, and no
layer is replaced.

A row of the table (see `ops/table.py`) computes the output with the same function that was called,
so the forward is PyTorch's own. The row also attaches an autograd node that saves stashes instead
of tensors. A call without a row runs under the generic fallback.

Cost: see the table of host times in docs/benchmarks.md.
"""

from __future__ import annotations

import functools
import types as python_types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from mesa_train.ops import arrays, table
from mesa_train.policy import Policy
from mesa_train.stash.context import ModuleContext, Report
from mesa_train.stash.recorder import Recorder, saved_hooks

from . import native
from .checkpoint_inputs import InputHooks
from .modes import Mode, exchange, exporting, from_outside, innermost, only_traced, untraced


class CompressionMode(Mode):
    """Context manager: torch calls inside save stashes as `context` says.

    Args:
        context: the module's name and rules.
        owner: identifies the wrap, so that nested wraps are distinct.
        report: the report that counts saved bytes; default: a new one.
        step: the number of the optimizer step, for running ranges; default 0.
    """

    def __init__(
        self, context: ModuleContext, owner: object, report: Report | None = None, step: int = 0
    ) -> None:
        super().__init__()
        if not self.traced:
            table.link()
        self.owner = owner
        self.recorder = Recorder(context, report, step)
        self.outer: list[Any] = []
        # The modes that were active before, if this mode replaces all of them while it is active.
        self.before: list[Any] = []
        self.inputs: InputHooks | None = None

    def __enter__(self) -> CompressionMode:
        if torch.compiler.is_compiling():
            self.before = from_outside()
            if self.before:
                exchange(only_traced(self.before))
        else:
            unhide_linear()
        # If the inner policy leaves an operator to PyTorch, the outer policy leaves it to PyTorch
        # too.
        other = innermost()
        if other is self:
            other = None
        self.outer.append((other, other.recorder.context if other is not None else None))
        if other is not None:
            other.recorder.context = _NOTHING
        if (
            len(self.outer) == 1
            and self.recorder.context.rules.operators["checkpoint"]
            and hookable()
        ):
            self.inputs = InputHooks(self.recorder)
            self.inputs.__enter__()
            self.recorder.hooks = saved_hooks()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        other, context = self.outer.pop()
        if other is not None:
            other.recorder.context = context
        if not self.outer and self.inputs is not None:
            self.inputs.__exit__(*error)
            self.inputs = None
        if self.before:
            exchange(self.before)
            self.before = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compiling = is_compiling()
        if not compiling and native.extension is not None:
            result = native.extension.dispatch(self, func, args, kwargs)
            if result is not native.extension.SLOW:
                return result
        kwargs = kwargs or {}
        if compiling:
            for arg in args[:2]:
                if arrays.is_array(arg):
                    return arrays.call(func, args, kwargs)
            if not self.traced:
                # A traced frame must not write to this mode. So each operator uses a mode of its
                # own and shares nothing.
                apart = CompressionMode(self.recorder.context, self.owner)
                return apart.__torch_function__(func, types, args, kwargs)
            if not torch.is_grad_enabled() or exporting():
                return func(*args, **kwargs)
            row = table.ROWS.get(func)
        else:
            if (
                not torch.is_grad_enabled()
                or _transformed()
                or saved_hooks() is not self.recorder.hooks
            ):
                return func(*args, **kwargs)
            row = table.ROWS.get(func) or table.EAGER.get(func)
            if row is None and func is F.multi_head_attention_forward:
                with self:
                    return _without_mode_check(func)(*args, **kwargs)
        if row is not None:
            result = row(self.recorder, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return table.fallback(self.recorder, func, args, kwargs)


for _method in (CompressionMode.__init__, CompressionMode.__enter__, CompressionMode.__exit__):
    untraced(_method)
untraced(CompressionMode.__torch_function__)


def active(owner: object) -> CompressionMode | None:
    """The mode of `owner` in this thread if it is the innermost mode, else None."""
    mode = innermost()
    return mode if mode is not None and mode.owner is owner else None


class _Nobody:
    """The owner of a mode that belongs to no model. torch.compile cannot trace `object()` in PyTorch 2.11."""


@untraced
def compress(policy: Policy | str | None = None) -> CompressionMode:
    """Context manager: torch calls inside save stashes as `policy` says. Needs no module.

    Args:
        policy: a `Policy`, a preset's name, or None for "mesa8". Overrides by operator apply.
    Returns:
        The compression mode, to be entered with `with`.
    Raises:
        ValueError: an override names a module. Here no module can match.
    """
    resolved = Policy.of(policy)
    if not torch.compiler.is_compiling():
        native.prepare(CompressionMode)
    return CompressionMode(ModuleContext("", resolved.rules([""])[""]), owner=_Nobody())


def hookable() -> bool:
    """True if saved-tensor hooks can be entered: not while compiling and not inside torch.func."""
    return (
        not torch.compiler.is_compiling()
        and not _transformed()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


# A context in which every operator is PyTorch's own.
_NOTHING = ModuleContext("", Policy(enabled=False).rules([""])[""])


def _transformed() -> bool:
    """True if PyTorch differentiates without the autograd graph, or makes a program.

    For untraced frames. True inside torch.func's transforms and forward-mode differentiation. Also
    true while torch.export or torch.jit.trace makes a program of PyTorch's operators.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or exporting()
    )


@functools.cache
def _without_mode_check(func: python_types.FunctionType) -> python_types.FunctionType:
    """A copy of a composite function whose own check for modes returns False.

    PyTorch suspends a mode while the mode's `__torch_function__` runs, and a composite first checks
    for modes. So a second call with the mode active would never end. The copy skips the check and
    calls its functions under the mode.
    """
    names = {**func.__globals__, "has_torch_function": lambda *_: False}
    twin = python_types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


_LINEAR = torch._C._nn.linear
_REPLACED = ("deepspeed.runtime.zero.linear", "zero3_linear_wrap")


def unhide_linear() -> None:
    """Make `torch.nn.functional.linear` visible to a mode again if ZeRO-3 has replaced it."""
    replacement: Any = nn.functional.linear
    if replacement is _LINEAR:
        return
    if (
        getattr(replacement, "__module__", ""),
        getattr(replacement, "__name__", ""),
    ) != _REPLACED or hasattr(replacement, "_mesa_train"):
        return

    @functools.wraps(replacement)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mode = innermost()
        if (
            mode is not None
            and torch.is_grad_enabled()
            and mode.recorder.covers("linear", input, weight)
        ):
            return _LINEAR(input, weight, bias)
        return replacement(input, weight, bias)

    linear._mesa_train = True  # type: ignore[attr-defined]
    nn.functional.linear = linear
