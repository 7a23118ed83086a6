"""The compression mode: a TorchFunctionMode that looks every torch call up in one table.

Modules and functional calls meet here alike, so no model is forked and no layer replaced. A row of
the table (see `ops/table.py`) computes the output with the very function that was called, so the
forward is PyTorch's own, and attaches an autograd node that keeps stashes instead of tensors. A
call without a row runs under the generic fallback. Cost: about 1 us per torch call, 10 to 30 us per
recorded operator.
"""

from __future__ import annotations

import functools
import types as python_types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mesa_train.ops import arrays, table
from mesa_train.policy import Policy
from mesa_train.stash.context import ModuleContext, Report
from mesa_train.stash.recorder import Recorder, saved_hooks

from .checkpoint_inputs import InputHooks
from .modes import Mode, exchange, from_outside, innermost, only_traced, untraced


class CompressionMode(Mode):
    """Context manager: torch calls inside keep stashes as `context` says. `owner` tells nested wraps
    apart."""

    def __init__(
        self, context: ModuleContext, owner: object, report: Report | None = None, step: int = 0
    ) -> None:
        super().__init__()
        if not self.traced:
            table.link()
        self.owner = owner
        self.recorder = Recorder(context, report, step)
        self.outer: list[Any] = []
        # The modes that were on before, if this one is alone while it is on.
        self.before: list[Any] = []
        self.inputs: InputHooks | None = None

    def __enter__(self) -> CompressionMode:
        if torch.compiler.is_compiling():
            self.before = from_outside()
            if self.before:
                exchange(only_traced(self.before))
        else:
            unhide_linear()
        # What the inner policy leaves alone is not the outer one's either.
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
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            for arg in args[:2]:
                if arrays.is_array(arg):
                    return arrays.call(func, args, kwargs)
            if not self.traced:
                # Nothing may be written to this one, so each operator keeps what it needs by itself.
                apart = CompressionMode(self.recorder.context, self.owner)
                return apart.__torch_function__(func, types, args, kwargs)
            if not torch.is_grad_enabled() or torch.compiler.is_exporting():
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
    """The mode of `owner` that is on in this thread, if the innermost one is its."""
    mode = innermost()
    return mode if mode is not None and mode.owner is owner else None


@untraced
def compress(policy: Policy | str | None = None) -> CompressionMode:
    """Context manager: whatever is computed inside keeps its stashes as `policy` says, no module
    needed.

    policy: a `Policy`, a preset's name, or None for "mesa8". Overrides by module name match nothing
    here and raise ValueError; those by operator apply.
    """
    resolved = Policy.of(policy)
    if not torch.compiler.is_compiling():
        table.prepare()
    return CompressionMode(ModuleContext("", resolved.rules([""])[""]), owner=object())


def hookable() -> bool:
    """Whether saved-tensor hooks can be entered: not while compiling, nor inside torch.func."""
    return (
        not torch.compiler.is_compiling()
        and not _transformed()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


# A context where every operator is PyTorch's.
_NOTHING = ModuleContext("", Policy(enabled=False).rules([""])[""])


def _transformed() -> bool:
    """Outside of a traced frame: inside torch.func's transforms or forward-mode differentiation, which have other
    means than the autograd graph; and where torch.export or torch.jit.trace makes a program of PyTorch's
    operators."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_exporting()
    )


@functools.cache
def _without_mode_check(func: python_types.FunctionType) -> python_types.FunctionType:
    """A composite function whose own check for modes answers no.

    PyTorch suspends a mode while its `__torch_function__` runs, and a composite checks for modes before it
    does anything, so calling it again with the mode on would never end. The copy calls its functions under
    the mode.
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
    """Let a mode see `torch.nn.functional.linear` again if ZeRO-3 has replaced it."""
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
