"""Support for NumPy arrays while torch.compile traces.

Dynamo traces NumPy code as torch code. If a torch function mode is active, Dynamo turns operators
on arrays (`a > 0`) into methods of Tensor. Arrays do not have these methods. So the mode calls the
operators again: while it handles a call, Dynamo does not turn them into methods.
"""

from __future__ import annotations

import operator
from typing import Any

# Method of Tensor: name in the module `operator`.
_METHODS = {
    **{n: n for n in ("add", "sub", "mul", "matmul", "pow", "lt", "gt", "le", "ge", "ne", "eq")},
    **{n: n for n in ("neg", "abs", "invert", "lshift", "rshift", "floordiv", "mod", "truediv")},
    "div": "truediv",
    "remainder": "mod",
    "floor_divide": "floordiv",
    "positive": "pos",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
    "bitwise_xor": "xor",
    "getitem": "getitem",
    "and": "and_",
    "or": "or_",
    "xor": "xor",
    "setitem": "setitem",
    **{f"{n}_": f"i{n}" for n in ("add", "sub", "mul", "pow")},
    "div_": "itruediv",
    "remainder_": "imod",
    "floor_divide_": "ifloordiv",
    **{f"i{n}": f"i{n}" for n in ("and", "or", "xor", "lshift", "rshift")},
}


def is_array(value: Any) -> bool:
    """True if a value is a NumPy array. Tested by name, because NumPy may not be installed."""
    return type(value).__name__ == "ndarray"


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func`, a method of Tensor that Dynamo made of an operator, with arrays among `args`."""
    name = _operator(func)
    if not name:
        return func(*args, **kwargs)
    if name.startswith("r "):
        return getattr(operator, name[2:])(args[1], args[0])
    return getattr(operator, name)(*args)


def _operator(func: Any) -> str:
    """The operator's name, or "". The prefix "r " means exchanged operands."""
    name = getattr(func, "__name__", "").removeprefix("__").removesuffix("__")
    if name in _METHODS:
        return _METHODS[name]
    return f"r {_METHODS[name[1:]]}" if name[:1] == "r" and name[1:] in _METHODS else ""


# Dynamo calls this function while tracing, and does not trace it, as in `fallback.py`.
_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]
