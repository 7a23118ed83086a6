"""Functions that look like another one: its parameters, defaults, globals, free variables and place in the source.

A wrapped module's `forward` passes all of its arguments on, so `*args, **kwargs` would do to compute. But signatures
are read (`inspect.signature`, `getfullargspec`, `__code__`), `torch.jit.script` reads the source, and `torch.fx` reads
the globals. They all find those of the function that is mirrored. Costs one compilation of one line per function
(0.2 ms), when a model is wrapped.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import types
from collections.abc import Callable
from typing import Any

_ENTER, _GIVEN, _SELF = "_mesa_train_enter", "_mesa_train_given", "_mesa_train_self"


def mirror(
    function: Any, enter: Callable[..., Any], given: Any, *, method: bool
) -> Callable[..., Any]:
    """A function to be bound to a module, which returns `enter(module, given, args, kwargs)`.

    function: the callable to look like. If it is no Python function, only its signature is taken.
    enter, given: see above. `args` is a tuple and `kwargs` a dict, defaults filled in.
    method: whether the first parameter of `function` is the module. It is then the first of `args` too.
    """
    if not isinstance(function, types.FunctionType):
        return _generic(function, enter, given, method)
    code = _code(function.__code__, method)
    if code is None:
        return _generic(function, enter, given, method)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {_ENTER: types.CellType(enter), _GIVEN: types.CellType(given)}
    twin = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple([cells[name] for name in code.co_freevars]),
    )
    twin.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
    return _labelled(twin, function)


def _labelled(twin: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """`twin` with the name, docstring, annotations and attributes of `function`. Unlike `functools.wraps`, it
    does not refer to `function`: tools that look for an undecorated function would call that one instead."""
    for name in functools.WRAPPER_ASSIGNMENTS:
        if hasattr(function, name):
            setattr(twin, name, getattr(function, name))
    twin.__dict__.update(getattr(function, "__dict__", {}))
    return twin


def _generic(
    function: Any, enter: Callable[..., Any], given: Any, method: bool
) -> Callable[..., Any]:
    """The mirror of a callable without Python code, or with parameters that no source can have."""

    def forward(_mesa_train_self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if method:
            args = (_mesa_train_self, *args)
        return enter(_mesa_train_self, given, args, kwargs)

    if isinstance(function, types.FunctionType):
        _labelled(forward, function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return forward
    if not method:
        first = inspect.Parameter(_SELF, inspect.Parameter.POSITIONAL_ONLY)
        parameters = list(signature.parameters.values())
        if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            first = first.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = signature.replace(parameters=[first, *parameters])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


@functools.cache
def _code(plain: types.CodeType, method: bool) -> types.CodeType | None:
    """The code of a mirror: one object per function, since torch.compile tells functions apart by it. None if there
    is no such source."""
    positional = plain.co_posonlyargcount, plain.co_argcount
    names = list(plain.co_varnames)
    if not all(n.isidentifier() and not keyword.iskeyword(n) for n in names):
        return None
    first, only, rest = names[: positional[1]], [], names[positional[1] :]
    only, rest = rest[: plain.co_kwonlyargcount], rest[plain.co_kwonlyargcount :]
    many = rest.pop(0) if plain.co_flags & inspect.CO_VARARGS else None
    named = rest.pop(0) if plain.co_flags & inspect.CO_VARKEYWORDS else None
    if method and not first:
        return None
    module = first[0] if method else _SELF
    posonly = positional[0]
    if not method:
        first, posonly = [_SELF, *first], posonly + 1
    parameters = [*first[:posonly], *(["/"] if posonly else []), *first[posonly:]]
    if many or only:
        parameters += [f"*{many or ''}", *only]
    if named:
        parameters.append(f"**{named}")
    given = [*(first if method else first[1:]), *([f"*{many}"] if many else [])]
    keywords = [*[f'"{n}": {n}' for n in only], *([f"**{named}"] if named else [])]
    free = "".join([f"; {n}" for n in plain.co_freevars])
    call = f"{_ENTER}({module}, {_GIVEN}, ({''.join([g + ', ' for g in given])}), {{{', '.join(keywords)}}})"
    # Statements after the return make free variables of the names, and are never run.
    source = (
        f"def make({', '.join([_ENTER, _GIVEN, *plain.co_freevars])}):\n"
        f" def forward({', '.join(parameters)}): return {call}{free}"
    )
    made = compile(source, plain.co_filename, "exec").co_consts[0]
    code: types.CodeType = next(c for c in made.co_consts if isinstance(c, types.CodeType))
    changed: dict[str, Any] = {"co_firstlineno": plain.co_firstlineno, "co_name": plain.co_name}
    if hasattr(plain, "co_qualname"):  # Python 3.11
        changed["co_qualname"] = plain.co_qualname
    return code.replace(**changed)
