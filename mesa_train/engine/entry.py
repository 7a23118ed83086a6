"""The call of a wrapped module: its forward runs under the compression mode.

Every module enters the mode, not only the outermost one. A checkpoint's recompute runs one block
alone in the backward, and this block then has the same policy. If no tensor inside needs a
gradient, the module enters nothing and saves nothing. A tracer (torch.export, torch.jit.trace,
torch.fx) sees the plain model.

Cost: two Python frames for each call of a module, and the native `enter` (see `native.py`).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.compiler import is_compiling

from mesa_train.policy import Policy
from mesa_train.stash import sharded_parameters
from mesa_train.stash.context import ModuleContext, Report
from mesa_train.stash.recorder import saved_hooks

from . import native
from .checkpoint_inputs import InputHooks
from .intercept import CompressionMode, active, hookable
from .modes import aside, exchange, exporting, put_aside, tracer, untraced
from .step_counter import StepCounter

ATTRIBUTE = "_mesa_train"


class Installed:
    """State that all modules of one wrapped model share.

    Attributes:
        policy: the policy of the model.
        report: the report of the last forward.
        steps: counts optimizer steps, for running ranges.
        broken: whether the warning about a graph break was logged.
        model: weak reference to the wrapped model.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.report = Report()
        self.steps = StepCounter()
        self.broken = False
        self.model: weakref.ref[nn.Module] | None = None
        changes = [policy.ranges, *[o.get("ranges") for o in policy.overrides.values()]]
        self._running = "running" in changes

    def begins(self, context: ModuleContext) -> None:
        """Begin a forward that is called from outside, of the whole model or of a part.

        Counts an optimizer step if the weights have changed. A forward of the whole model clears
        the report.
        """
        if context.name == "":
            self.report.rows.clear()
        # A checkpoint's recompute runs within a backward. Its step is counted already.
        if self._running and torch._C._current_graph_task_id() == -1:
            model = self.model() if self.model is not None else None
            self.steps.update(model if model is not None else context.module)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": Report(), "model": None}


def enter(
    module: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    again: bool = False,
) -> Any:
    """Call a wrapped module's plain forward under the compression mode.

    Args:
        module: the wrapped module.
        call: its plain forward.
        args: positional arguments of `call`.
        kwargs: keyword arguments of `call`.
        again: True inside the module's own checkpoint.
    Returns:
        The output of `call`.
    """
    compiling = is_compiling()
    if not compiling and not again and native.extension is not None:
        result = native.extension.enter(module, call, args, kwargs)
        if result is not native.extension.SLOW:
            return result
    entry = module.__dict__.get(ATTRIBUTE)
    if entry is None:
        return call(*args, **kwargs)
    if not torch.is_grad_enabled() or not (compiling or _differentiable(module, args, kwargs)):
        if compiling or not torch._C._len_torch_function_stack():
            return call(*args, **kwargs)
        with aside():
            return call(*args, **kwargs)
    installed, context = entry.installed, entry.context
    if context.checkpointed and not again:
        return _checkpointed(module, entry, call, args, kwargs)
    if not compiling and callable(tracer()):
        modes = put_aside(installed, context.name, context.module)
        try:
            return call(*args, **kwargs)
        finally:
            exchange(modes)
    mode = active(installed)
    if mode is None:
        if _traced():
            return call(*args, **kwargs)
        if not compiling:
            installed.begins(context)
        with CompressionMode(context, installed, installed.report, installed.steps.count):
            return call(*args, **kwargs)
    recorder = mode.recorder
    outside, recorder.context = recorder.context, context
    if compiling:
        try:
            return call(*args, **kwargs)
        finally:
            recorder.context = outside
    hooks = saved_hooks()
    kind: Any = type(module)
    if hooks is recorder.hooks and not sharded_parameters.is_fsdp_module(kind):
        try:
            return call(*args, **kwargs)
        finally:
            recorder.context = outside
    # Either a checkpoint began after the mode, or FSDP frees the parameters inside apart from the
    # parameters outside. In both cases, the stashes saved inside must not depend on stashes saved
    # outside.
    scope = recorder.hooks, recorder.lineage, recorder.linears
    recorder.begin(hooks)
    try:
        return call(*args, **kwargs)
    finally:
        recorder.context = outside
        recorder.hooks, recorder.lineage, recorder.linears = scope


def _checkpointed(
    module: Any,
    entry: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module's forward so that it saves only its inputs and runs again in the backward."""
    installed, context = entry.installed, entry.context
    mode = active(installed)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return enter(module, call, args, kwargs, again=True)

    run = functools.partial(
        torch.utils.checkpoint.checkpoint, forward, *args, use_reentrant=False, **kwargs
    )
    if mode is None:
        # This is the model itself, or a module that the user calls alone.
        if _traced():
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling():
            installed.begins(context)
        with CompressionMode(context, installed, installed.report, installed.steps.count):
            return run()
    recorder = mode.recorder
    outside, recorder.context = recorder.context, context
    try:
        # Inside a checkpoint of the user, this checkpoint's inputs are not saved at all.
        if mode.inputs is None and context.rules.operators["checkpoint"] and hookable():
            with InputHooks(recorder):
                return run()
        return run()
    finally:
        recorder.context = outside


# torch.compile traces the frames of wrapped modules, but not these frames between them.
for _frame in (enter, _checkpointed):
    untraced(_frame, inside=False)


def _traced() -> bool:
    """True if torch.export, torch.jit.trace, torch.fx or make_fx makes a program of the model.

    These tracers get the plain model, because they can differentiate its operators.
    """
    if exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    symbolic = sys.modules.get("torch.fx._symbolic_trace")
    if symbolic is not None and symbolic.is_fx_symbolic_tracing():
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


@untraced
def _differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if an argument or a parameter of the module may need a gradient.

    A tensor from elsewhere (a global, a closure) is not seen here. The inner module that receives
    it as an argument sees it.
    """
    # Under a mode, even reading `requires_grad` is a call that goes through the mode.
    with torch._C.DisableTorchFunction():
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
        return (
            _any_tracked(args, module) or _any_tracked(kwargs.values(), module) or _trains(module)
        )


# Types that contain no tensors.
_ATOMS = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


def _any_tracked(values: Any, module: nn.Module) -> bool:
    """True if a value, or a value inside a container, may need a gradient."""
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif value is module or isinstance(value, _ATOMS):
            continue
        elif isinstance(value, dict):
            if _any_tracked(value.values(), module):
                return True
        elif not isinstance(value, (list, tuple)) or _any_tracked(value, module):
            return True  # an object that may contain tensors
    return False


def _trains(module: nn.Module) -> bool:
    """True if a parameter of the module or of its submodules needs a gradient."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for child in module._modules.values():
        if child is not None and _trains(child):
            return True
    if module._parameters:
        return False
    # FSDP1 and DataParallel replace parameters by plain tensors.
    return any([isinstance(v, Tensor) and v.requires_grad for v in vars(module).values()])
