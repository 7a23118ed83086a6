"""The entry of a wrapped module: extra attributes, and a `forward` that is bound to the module.

`nn.Module.__call__` reads `forward` from the module's `__dict__` before it reads the class. So
`wrap` changes only the `__dict__`. The class, the Parameters, buffers, hooks, state_dict keys and
submodules stay as they are.

Two more methods in the `__dict__` make copies correct. Without these methods, a copy would hold
functions that are bound to the original module and compute with it.

Cost: about 1 kB a module.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from mesa_train.stash.context import ModuleContext

from .entry import ATTRIBUTE, Installed, enter
from .mirror import mirror, mirrors_for

_FORWARD = "forward"
# The `__dict__` has no `forward`.
ABSENT: Any = inspect.Parameter.empty


# Reads a module's attributes, even if the module's class has a property named `__dict__`.
attributes_of: Callable[[nn.Module], dict[str, Any]] = nn.Module.__dict__["__dict__"].__get__


class Entry:
    """The extra attributes of one wrapped module.

    Attributes:
        installed: state that all modules of the wrapped model share.
        context: the module's name and rules.
        own: the `forward` that the module had in its `__dict__` before `wrap`, or ABSENT.
        forward: the `forward` that `wrap` puts into the `__dict__`. None if the module cannot have
            one or needs none.
    """

    def __init__(self, installed: Installed, context: ModuleContext, own: Any = ABSENT) -> None:
        self.installed, self.context, self.own = installed, context, own
        self.forward: Callable[..., Any] | None = None

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        assert self.context.module is not None
        return self.context.module

    def put_on(self) -> None:
        """Give the module its attributes."""
        module, attributes = self.module, attributes_of(self.module)
        if self.context.name == "":
            self.installed.model = weakref.ref(module)
        attributes[ATTRIBUTE] = self
        if self.forward is None:
            return
        attributes[_FORWARD] = self.forward
        for name, method in _methods(module):
            attributes[name] = types.MethodType(method, module)

    def prepare(self) -> None:
        """Make the `forward`.

        Does not change the module; raises any error that the module's class raises.
        """
        if enterable(self.module, self.own) and not _idle(self.module, self.own):
            self.forward = _forward_of(self.module, self.own)

    def take_off(self) -> None:
        """Restore the module's own attributes.

        An attribute that the user replaced since `wrap` stays.
        """
        attributes = attributes_of(self.module)
        attributes.pop(ATTRIBUTE, None)
        if self.forward is None:
            return
        for name, method in _METHODS.items():
            if getattr(attributes.get(name), "__func__", None) is method:
                del attributes[name]
        if mirrors_for(attributes.get(_FORWARD)) is self.module:
            if self.own is ABSENT:
                del attributes[_FORWARD]
            else:
                attributes[_FORWARD] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (
            self.installed,
            self.context,
            *(() if self.own is ABSENT else (self.own,)),
        )


def _revived(installed: Installed, context: ModuleContext, *own: Any) -> Entry:
    """The entry of a module during unpickling or deep copy.

    The module's other attributes are set later.
    """
    entry = Entry(installed, context, *own)
    entry.prepare()
    entry.put_on()
    return entry


def entry_of(module: nn.Module) -> Entry | None:
    """The entry of a wrapped module, or None.

    A shallow copy of a wrapped module is not wrapped itself. Its submodules are.
    """
    entry = attributes_of(module).get(ATTRIBUTE)
    return entry if entry is not None and entry.module is module else None


def own_forward(module: nn.Module) -> Any:
    """The `forward` in the `__dict__` of a module, or ABSENT.

    If the class defines `forward` as a `functools.cached_property`, this function evaluates the
    property, as the first call would. The property then stores the forward in the `__dict__` and
    later returns it from there.
    """
    attributes = attributes_of(module)
    if _FORWARD not in attributes and _other(inspect.getattr_static(type(module), _FORWARD)):
        _found(module)
    return attributes.get(_FORWARD, ABSENT)


def enterable(module: nn.Module, own: Any = ABSENT) -> bool:
    """True if Python would call a `forward` in the `__dict__` of `module`.

    Two cases are False. If the class has a property named `forward`, Python calls the property
    instead. A module of torch.compile has a `forward` in its `__dict__` that runs compiled code of
    the inner module.
    """
    if own is not ABSENT:
        return not _optimized(module)
    found = inspect.getattr_static(type(module), _FORWARD)
    return not hasattr(type(found), "__set__")


def _idle(module: nn.Module, own: Any) -> bool:
    """True if the `forward` of `module` only returns its argument.

    Models have many such modules, and entering one takes 5 us.
    """
    found = inspect.getattr_static(type(module), _FORWARD)
    return own is ABSENT and found is nn.Identity.__dict__[_FORWARD]


def _other(found: Any) -> bool:
    """True if a class's `forward` is a descriptor other than a method or a property."""
    method = (types.FunctionType, functools.partialmethod, staticmethod, classmethod)
    kind = type(found)
    return (
        not isinstance(found, method) and hasattr(kind, "__get__") and not hasattr(kind, "__set__")
    )


def _optimized(module: nn.Module) -> bool:
    """True if `module` is a compiled module of torch.compile."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _forward_of(module: nn.Module, own: Any) -> Callable[..., Any]:
    """The `forward` for the `__dict__` of `module`.

    If it replaces a method of the module, it is a method too, and its function is shared by the
    class. Otherwise it is a function that holds the module.
    """
    if own is ABSENT:
        kind, found = type(module), inspect.getattr_static(type(module), _FORWARD)
        if isinstance(found, types.FunctionType):
            return types.MethodType(_of_class(found), module)
        if isinstance(found, functools.partialmethod):
            return types.MethodType(mirror(kind.forward, _enter_named, None), module)
        if isinstance(found, (staticmethod, classmethod)) or not hasattr(type(found), "__get__"):
            return mirror(kind.forward, _enter_named, None, module)
        return mirror(_found(module), _enter_found, None, module)
    if isinstance(own, types.MethodType) and isinstance(own.__func__, types.FunctionType):
        return types.MethodType(mirror(own.__func__, _enter_bound, own), module)
    return mirror(own, enter, own, module)


@functools.cache
def _of_class(forward: Any) -> Callable[..., Any]:
    """The mirror of a class's `forward`, made once per function."""
    return mirror(forward, _enter_class, forward)


def _enter_class(module: Any, mirrored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Enter with the `forward` of the module's class, read at each call.

    The class can change: PyTorch exchanges the class of a lazy module, and a user can assign
    another forward to a class.
    """
    call = type(module).forward
    if call is not mirrored and isinstance(call, types.FunctionType):
        args, kwargs = _without_defaults(mirrored, args, kwargs)
    return enter(module, call, args, kwargs)


def _enter_bound(module: Any, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Enter with a bound method whose first argument is not `module`."""
    return enter(module, own, args[1:], kwargs)


def _enter_named(module: Any, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Enter with the class attribute `forward`.

    It is a static, class or partial method, or a callable object.
    """
    return enter(module, type(module).forward, args, kwargs)


def _enter_found(module: Any, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Enter with the callable that another kind of descriptor returns for the module."""
    return enter(module, _found(module), args, kwargs)


def _found(module: Any) -> Any:
    """The callable that the class's descriptor `forward` returns for the module."""
    return inspect.getattr_static(type(module), _FORWARD).__get__(module, type(module))


def _without_defaults(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `function` that differ from its defaults.

    Another function may not have these defaults.
    """
    code, defaults = function.__code__, function.__defaults__ or ()
    needed = code.co_argcount - len(defaults)
    if len(args) > code.co_argcount or needed < code.co_posonlyargcount:
        return args, kwargs
    names = code.co_varnames[needed : code.co_argcount]
    given = {n: v for n, v, d in zip(names, args[needed:], defaults, strict=True) if v is not d}
    own = function.__kwdefaults__ or {}
    named = {n: v for n, v in kwargs.items() if n not in own or v is not own[n]}
    return args[:needed], {**given, **named}


def _getstate(module: Any) -> Any:
    """`__getstate__` of a wrapped module."""
    return _freed(module, type(module).__getstate__(module))


def _freed(module: Any, state: Any) -> Any:
    """The state of a wrapped module without the functions that are bound to it.

    Bound functions would compute with the original module instead of the copy. The entry stays in
    the state and makes these functions again for the copy.
    """
    if isinstance(state, tuple) and state:
        return (_freed(module, state[0]), *state[1:])
    entry = attributes_of(module).get(ATTRIBUTE)
    if not isinstance(state, dict) or entry is None:
        return state
    state = {k: v for k, v in state.items() if k not in _METHODS}
    if mirrors_for(state.get(_FORWARD)) is module:
        del state[_FORWARD]
        if entry.own is not ABSENT:
            state[_FORWARD] = _Own(entry)
    return state


def _reduce(module: Any) -> Any:
    """`__reduce__` of a wrapped module whose class defines `__reduce__`.

    The arguments of the copy's constructor may include all attributes, as for
    `torch.fx.GraphModule`. In that case the copy is wrapped after it is made.
    """
    kind: Any = type(module)
    reduced = kind.__reduce__(module)
    entry = attributes_of(module).get(ATTRIBUTE)
    if not isinstance(reduced, tuple) or entry is None:
        return reduced
    make, args, *rest = reduced
    if rest:
        rest[0] = _freed(module, rest[0])
    if any([isinstance(a, dict) and ATTRIBUTE in a for a in args]):
        args = tuple([_freed(module, a) for a in args])
        for attributes in args:
            if isinstance(attributes, dict):
                attributes.pop(ATTRIBUTE, None)
        args = make, args, entry.installed, dataclasses.replace(entry.context, module=None)
        make = _again
    return (make, args, *rest)


def _again(make: Any, args: tuple[Any, ...], installed: Installed, context: ModuleContext) -> Any:
    """Make a module with `make(*args)` and wrap it."""
    module = make(*args)
    _revived(installed, dataclasses.replace(context, module=module))
    return module


class _Own:
    """A module's own `forward` within the module's state.

    A shallow copy is not wrapped and gets the own forward. A deep copy or a pickle gets the forward
    that enters the compression mode.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.entry.own(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward, (self.entry,)


def _forward(entry: Entry) -> Any:
    """The `forward` that an entry puts on its module."""
    return entry.forward


def _replicate(module: Any) -> nn.Module:
    """`_replicate_for_data_parallel` of a wrapped module.

    Binds the replica's forward to the replica.
    """
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    attributes = attributes_of(replica)
    entry = attributes.get(ATTRIBUTE)
    if entry is not None and mirrors_for(attributes.get(_FORWARD)) is module:
        attributes[_FORWARD] = _forward_of(replica, entry.own)
    for name, method in _methods(replica):
        attributes[name] = types.MethodType(method, replica)
    return replica


_METHODS = {
    "__getstate__": _getstate,
    "_replicate_for_data_parallel": _replicate,
    "__reduce__": _reduce,
}
for _name, _method in _METHODS.items():
    _method.__name__ = _name  # pickle finds a bound method by its `__name__`


def _methods(module: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The copy methods that a module needs. `__reduce__` only if the module's class defines one."""
    own = type(module).__reduce__ is not object.__reduce__
    return [(n, m) for n, m in _METHODS.items() if own or n != "__reduce__"]
