"""Composite functions, re-entered so that the functions they call are looked up too.

PyTorch suspends a mode while its own `__torch_function__` runs, and a composite checks for modes
before it does anything, so calling it again with the mode on would never end. We call its twin, the
same code with that check answering no, under the mode.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mesa_train.intercept import Interception


def reenter(mode: Interception, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Row of torch.nn.functional.multi_head_attention_forward."""
    if torch.compiler.is_compiling():
        return NotImplemented
    with mode:
        return _twin(func)(*args, **kwargs)


@functools.cache
def _twin(func: types.FunctionType) -> types.FunctionType:
    names = {**func.__globals__, "has_torch_function": lambda *_: False}
    twin = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin
