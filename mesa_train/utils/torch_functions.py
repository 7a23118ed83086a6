"""Name torch functions, for reports and for the overrides of a policy.

A function has one name for its in-place form, its operator and its reflected operator: `mul` is the
name of `mul`, `mul_`, `__imul__` and `__rmul__`. A name is known if torch has a function or an
operator of that name, or if a library has registered such an operator. The known names are read
when an override is read, so they cost nothing in a forward.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OWNERS = (torch, Tensor, F)


def function_name(func: Any) -> str:
    """A torch function's plain name.

    Examples: `linear`, `mul` for `Tensor.__rmul__`, `relu` for `relu_`, `bar` for the operator
    `foo::bar`.
    """
    name = str(getattr(func, "__name__", type(func).__name__))
    if name in ("__get__", "__set__"):  # A property, such as Tensor.T.
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return plain_name(name.partition(".")[0])


def plain_name(name: str) -> str:
    """`name` without the underscores and letters of in-place and reflected forms."""
    name = name.strip("_")
    arithmetic = re.fullmatch(r"[ri]?(add|sub|mul|truediv|div|matmul|pow)", name)
    return {"truediv": "div"}.get(arithmetic[1], arithmetic[1]) if arithmetic else name


def is_function(name: str) -> bool:
    """True if torch, or a loaded library, has a function of this plain name."""
    return any(hasattr(owner, name) for owner in _OWNERS) or name in _registered()


def checked(pattern: str, name: str) -> str:
    """The plain name of the function `name` in an override's `pattern`.

    Raises:
        ValueError: there is no such function; the message has close names.
    """
    plain = plain_name(name)
    if not is_function(plain):
        public = {name for owner in _OWNERS for name in dir(owner) if not name.startswith("_")}
        names = sorted({plain_name(name) for name in public} | _registered())
        close = ", ".join([f"fallback.{name}" for name in difflib.get_close_matches(plain, names)])
        raise ValueError(
            f"override {pattern!r} matches no function of torch or of a loaded library"
            f"{f'; close names: {close}' if close else ''}"
        )
    return plain


def _registered() -> set[str]:
    """Plain names of the operators that libraries have registered so far."""
    names = torch._C._dispatch_get_all_op_names()
    return {plain_name(name.partition("::")[2].partition(".")[0]) for name in names}
