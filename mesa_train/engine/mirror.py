"""Mirrors: functions that look like another function to inspecting tools.

A mirror has the other function's parameters, defaults, globals, free variables and source position.

Why: a wrapped module's `forward` passes all its arguments on, so `*args, **kwargs` would be enough
to compute. But other tools read the function. `inspect.signature`, `getfullargspec` and `__code__`
read the signature, `torch.jit.script` reads the source, and `torch.fx` reads the globals. With a
mirror, these tools read the properties of the original function.

Cost: one compilation of one line per function (0.2 ms), when a model is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import keyword
import types
from collections.abc import Callable
from typing import Any

_ENTER, _GIVEN, _MODULE = "_mesa_train_enter", "_mesa_train_given", "_mesa_train_module"


def mirror(
    function: Any, enter: Callable[..., Any], given: Any, module: Any = None
) -> Callable[..., Any]:
    """A function that looks like `function` and returns `enter(module, given, args, kwargs)`.

    `args` is a tuple and `kwargs` a dict, with the defaults of `function` filled in.

    Args:
        function: the callable to look like. If it is not a Python function, only its signature is
            copied.
        enter: the function that the mirror calls.
        given: the second argument of `enter`.
        module: the first argument of `enter`. None for a method, whose first argument is the
            module; `args` then contains the module too.
    Returns:
        The mirror.
    """
    code = None
    if isinstance(function, types.FunctionType):
        code = _code(function.__code__, module is None)
    if code is None:
        return _generic(function, enter, given, module)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for name, value in ((_ENTER, enter), (_GIVEN, given), (_MODULE, module)):
        cells[name] = types.CellType(value)
    twin = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple([cells[name] for name in code.co_freevars]),
    )
    twin.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
    return _labelled(twin, function)


def mirrors_for(forward: Any) -> Any:
    """The module that `forward` enters if it is a mirror or a method made of one, else None."""
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, types.FunctionType):
        return None
    names = function.__code__.co_freevars
    if _ENTER not in names:
        return None
    if isinstance(forward, types.MethodType):
        return forward.__self__
    assert function.__closure__ is not None
    return function.__closure__[names.index(_MODULE)].cell_contents


def _labelled(twin: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """`twin` with the name, docstring, annotations and attributes of `function`.

    Unlike `functools.wraps`, it keeps no reference to `function`. Tools that look for an
    undecorated function would otherwise call `function` instead.
    """
    for name in functools.WRAPPER_ASSIGNMENTS:
        if hasattr(function, name):
            setattr(twin, name, getattr(function, name))
    twin.__dict__.update(getattr(function, "__dict__", {}))
    return twin


def _generic(
    function: Any, enter: Callable[..., Any], given: Any, module: Any
) -> Callable[..., Any]:
    """The mirror of a callable without Python code.

    Also for parameters that no source text can express.
    """

    _mesa_train_enter, _mesa_train_module = enter, module

    def forward(*args: Any, **kwargs: Any) -> Any:
        owner = args[0] if _mesa_train_module is None else _mesa_train_module
        return _mesa_train_enter(owner, given, args, kwargs)

    if isinstance(function, types.FunctionType):
        _labelled(forward, function)
    with contextlib.suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return forward


@functools.cache
def _code(plain: types.CodeType, method: bool) -> types.CodeType | None:
    """The code object of a mirror, or None if no source text can express it.

    One code object per function, because torch.compile distinguishes functions by their code
    object.
    """
    names, count = list(plain.co_varnames), plain.co_argcount
    if not all([n.isidentifier() and not keyword.iskeyword(n) for n in names]):
        return None
    first, names = names[:count], names[count:]
    only, names = names[: plain.co_kwonlyargcount], names[plain.co_kwonlyargcount :]
    many = names.pop(0) if plain.co_flags & inspect.CO_VARARGS else None
    rest = names.pop(0) if plain.co_flags & inspect.CO_VARKEYWORDS else None
    if method and not first and not many:
        return None
    module = (first[0] if first else f"{many}[0]") if method else _MODULE
    slash = plain.co_posonlyargcount
    parameters = [*first[:slash], *(["/"] if slash else []), *first[slash:]]
    if many or only:
        parameters += [f"*{many or ''}", *only]
    if rest:
        parameters.append(f"**{rest}")
    args = "".join([f"{n}, " for n in [*first, *([f"*{many}"] if many else [])]])
    kwargs = ", ".join([*[f'"{n}": {n}' for n in only], *([f"**{rest}"] if rest else [])])
    # Statements after the return never run. They only make the names free variables.
    free = "".join([f"; {n}" for n in plain.co_freevars])
    source = (
        f"def make({', '.join([_ENTER, _GIVEN, _MODULE, *plain.co_freevars])}):\n"
        f" def forward({', '.join(parameters)}): "
        f"return {_ENTER}({module}, {_GIVEN}, ({args}), {{{kwargs}}}){free}"
    )
    made = compile(source, plain.co_filename, "exec").co_consts[0]
    code: types.CodeType = next(c for c in made.co_consts if isinstance(c, types.CodeType))
    changed: dict[str, Any] = {"co_firstlineno": plain.co_firstlineno, "co_name": plain.co_name}
    if hasattr(plain, "co_qualname"):  # Python 3.11
        changed["co_qualname"] = plain.co_qualname
    return code.replace(**changed)
