"""How a wrapped module's forward enters the interception.

A wrapped module has a `forward` of its own in its `__dict__`, bound to it, which `nn.Module.__call__` finds before
the class's. The class, the Parameters, buffers, hooks, state_dict keys and submodules are left as they are. Every
module has one, so a checkpoint's recompute, which runs a block on its own in the backward, meets the same policy.
Where nothing inside needs a gradient, nothing is entered and nothing kept. Costs two Python frames and about 2 us a
call.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import sharded
from .intercept import Interception, Report, Site, active, hookable, saved_hooks
from .mirror import mirror
from .modes import aside, exchange, put_aside, untraced
from .ops.checkpoint_inputs import InputHooks
from .policy import Policy
from .stash import Lineage
from .steps import Steps

ATTRIBUTE = "_mesa_train"
_FORWARD = "forward"
ABSENT: Any = inspect.Parameter.empty


class Installed:
    """What all modules of one wrapped model share: the policy and the report of the last
    forward."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.report = Report()
        self.steps = Steps()
        self.broken = False
        self.model: weakref.ref[nn.Module] | None = None
        changes = [policy.ranges, *[o.get("ranges") for o in policy.overrides.values()]]
        self._running = "running" in changes

    def begins(self, site: Site) -> None:
        """A forward from outside, of the whole model or of a part: see whether the weights have moved. That
        of the whole model clears the report."""
        if site.name == "":
            self.report.rows.clear()
        # A checkpoint's recompute, which belongs to a step that has been seen, runs within a backward.
        if self._running and torch._C._current_graph_task_id() == -1:
            model = self.model() if self.model is not None else None
            self.steps.look(model if model is not None else site.module)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": Report(), "model": None}


class Entry:
    """What a wrapped module has more than a plain one.

    installed: shared with the other modules. site: its name and rules. own: the `forward` that the module had in
    its `__dict__` before. forward: the one that is there now; None where a module cannot have one.
    """

    def __init__(self, installed: Installed, site: Site, own: Any = ABSENT) -> None:
        self.installed, self.site, self.own = installed, site, own
        self.forward: types.MethodType | None = None

    @property
    def module(self) -> nn.Module:
        assert self.site.module is not None
        return self.site.module

    def put_on(self) -> None:
        """Give the module its attributes."""
        module, attributes = self.module, self.module.__dict__
        if self.site.name == "":
            self.installed.model = weakref.ref(module)
        attributes[ATTRIBUTE] = self
        if self.forward is None:
            return
        attributes[_FORWARD] = self.forward
        for name, method in _METHODS.items():
            attributes[name] = types.MethodType(method, module)

    def prepare(self) -> None:
        """Make the `forward`. Changes nothing yet; raises what the class of the module raises."""
        if enterable(self.module, self.own):
            self.forward = types.MethodType(_function(self.module, self.own), self.module)

    def take_off(self) -> None:
        """Give the module its own attributes back. One that was exchanged since stays."""
        attributes = self.module.__dict__
        attributes.pop(ATTRIBUTE, None)
        if self.forward is None:
            return
        for name, method in _METHODS.items():
            if getattr(attributes.get(name), "__func__", None) is method:
                del attributes[name]
        if attributes.get(_FORWARD) == self.forward:
            if self.own is ABSENT:
                del attributes[_FORWARD]
            else:
                attributes[_FORWARD] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        own = () if self.own is ABSENT else (self.own,)
        return _revived, (self.installed, self.site, *own)


def _revived(installed: Installed, site: Site, *own: Any) -> Entry:
    """The entry of a module that is being unpickled or deep-copied; its other attributes come later."""
    entry = Entry(installed, site, *own)
    entry.prepare()
    entry.put_on()
    return entry


def entry_of(module: nn.Module) -> Entry | None:
    """The entry of a wrapped module. A shallow copy of one is not wrapped itself, only its parts are."""
    entry = module.__dict__.get(ATTRIBUTE)
    return entry if entry is not None and entry.module is module else None


def enterable(module: nn.Module, own: Any = ABSENT) -> bool:
    """Whether a `forward` in the `__dict__` of `module` would be called. A property would be called instead, and
    torch.compile's module has one in its `__dict__` that runs compiled code of the module inside."""
    if own is not ABSENT:
        return not _optimized(module)
    found = inspect.getattr_static(type(module), _FORWARD)
    return not hasattr(type(found), "__set__")


def _optimized(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _function(module: nn.Module, own: Any) -> Callable[..., Any]:
    """The function that enters `module`: one per class, or one per `forward` of its own."""
    if own is ABSENT:
        found = inspect.getattr_static(type(module), _FORWARD)
        return _of_class(found, type(module))  # type: ignore[arg-type]
    if isinstance(own, types.MethodType) and isinstance(own.__func__, types.FunctionType):
        return mirror(own.__func__, _enter_bound, own, method=True)
    return mirror(own, enter, own, method=False)


@functools.cache
def _of_class(found: Any, kind: type[nn.Module]) -> Callable[..., Any]:
    if isinstance(found, types.FunctionType):
        return mirror(found, enter, None, method=True)
    if isinstance(found, functools.partialmethod):
        return mirror(getattr(kind, _FORWARD), enter, None, method=True)
    # A static or class method, or a callable object.
    return mirror(getattr(kind, _FORWARD), _enter_found, None, method=False)


def enter(module: Any, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a wrapped module's plain forward: `own`, or that of its class (`args` begin with `module` then), which
    may have been exchanged since."""
    call = type(module).forward if own is None else own
    entry = module.__dict__.get(ATTRIBUTE)
    if entry is None:
        return call(*args, **kwargs)
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or not (compiling or _differentiable(module, args, kwargs)):
        if compiling or not torch._C._len_torch_function_stack():
            return call(*args, **kwargs)
        with aside():
            return call(*args, **kwargs)
    if entry.site.checkpointed:
        return _checkpointed(entry, call, args, kwargs)
    return _intercepted(entry, call, args, kwargs)


def _enter_bound(module: Any, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `enter`, for a bound method: its first argument is not `module`."""
    return enter(module, own, args[1:], kwargs)


def _enter_found(module: Any, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `enter`, for what is no function in the class."""
    found = inspect.getattr_static(type(module), _FORWARD)
    if hasattr(type(found), "__get__"):
        found = found.__get__(module, type(module))
    return enter(module, found, args, kwargs)


def _intercepted(
    entry: Entry, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    installed, site = entry.installed, entry.site
    modes = put_aside(installed, site.name, site.module)
    if modes is not None:
        try:
            return call(*args, **kwargs)
        finally:
            exchange(modes)
    mode = active(installed)
    if mode is None:
        if _traced():
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling():
            installed.begins(site)
        with Interception(site, installed, installed.report, installed.steps.count):
            return call(*args, **kwargs)
    outside, mode.site = mode.site, site
    scope, hooks = (mode.hooks, mode.lineage, mode.linears), saved_hooks()
    apart = hooks is not mode.hooks or (
        not torch.compiler.is_compiling() and sharded.unit(type(site.module))  # type: ignore[arg-type]
    )
    if apart:
        # A checkpoint began since, or parameters inside are freed apart from those outside. What
        # is kept inside must not depend on what was kept outside.
        mode.hooks, mode.lineage, mode.linears = hooks, Lineage(mode.relays), Lineage()
    try:
        return call(*args, **kwargs)
    finally:
        mode.site = outside
        if apart:
            mode.hooks, mode.lineage, mode.linears = scope


def _checkpointed(
    entry: Entry, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A module's forward that keeps its inputs alone, and runs again in the backward."""
    installed, site = entry.installed, entry.site
    mode = active(installed)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _intercepted(entry, call, args, kwargs)

    run = functools.partial(
        torch.utils.checkpoint.checkpoint, forward, *args, use_reentrant=False, **kwargs
    )
    if mode is None:
        # The model itself, or a module called by itself.
        if _traced():
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling():
            installed.begins(site)
        with Interception(site, installed, installed.report, installed.steps.count):
            return run()
    outside, mode.site = mode.site, site
    try:
        # Inside the hooks of a checkpoint of the user's own, this one's inputs are not kept at all.
        if mode.inputs is None and site.rules.operators["checkpoint"] and hookable():
            with InputHooks(mode):
                return run()
        return run()
    finally:
        mode.site = outside


# The frames of wrapped modules are traced, those in between are not.
for _frame in (enter, _intercepted, _checkpointed):
    untraced(_frame, inside=False)


def _traced() -> bool:
    """Whether a program is being made of the model by torch.export, torch.jit.trace, torch.fx or make_fx. They get
    the plain model, whose operators they can differentiate."""
    if torch.compiler.is_exporting():
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


def _differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient may be needed inside: of an argument, or of a parameter. A tensor that comes from
    elsewhere is found by the module inside that gets it."""
    return _any_tracked(args, module) or _any_tracked(kwargs.values(), module) or _trains(module)


# Types without tensors inside.
_ATOMS = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


def _any_tracked(values: Any, module: nn.Module) -> bool:
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
            return True  # an object that may hold anything
    return False


def _trains(module: nn.Module) -> bool:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for child in module._modules.values():
        if child is not None and _trains(child):
            return True
    # What FSDP1 and DataParallel put in the place of parameters.
    return any([isinstance(v, Tensor) and v.requires_grad for v in vars(module).values()])


def _getstate(module: Any) -> Any:
    """`__getstate__` of a wrapped module: of its attributes the entry alone, which makes the others again for the
    copy. Bound to the module, they would compute with it instead of a copy."""
    state = type(module).__getstate__(module)
    attributes = state[0] if isinstance(state, tuple) and state else state
    entry = module.__dict__.get(ATTRIBUTE)
    if not isinstance(attributes, dict) or entry is None:
        return state
    attributes = {k: v for k, v in attributes.items() if k not in _METHODS}
    if attributes.get(_FORWARD) == entry.forward:
        del attributes[_FORWARD]
        if entry.own is not ABSENT:
            attributes[_FORWARD] = _Own(entry)
    return (attributes, *state[1:]) if isinstance(state, tuple) else attributes


class _Own:
    """A module's own `forward` in a state of it: that itself in a shallow copy, which is not wrapped; the one that
    enters in a deep copy and a pickle."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.entry.own(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward, (self.entry,)


def _forward(entry: Entry) -> Any:
    return entry.forward


def _replicate(module: Any) -> nn.Module:
    """`_replicate_for_data_parallel` of a wrapped module: the replica's forward is bound to the replica."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    for name in (_FORWARD, *_METHODS):
        method = replica.__dict__.get(name)
        if isinstance(method, types.MethodType) and method.__self__ is module:
            replica.__dict__[name] = types.MethodType(method.__func__, replica)
    return replica


_METHODS = {"__getstate__": _getstate, "_replicate_for_data_parallel": _replicate}
