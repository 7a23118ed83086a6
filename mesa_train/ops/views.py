"""Functions that only move or relabel data, replayed on the source's stash: the result needs no
stash of its own.

One stored tensor then serves all its shapes: the attention output for the attention's backward, and
transposed and reshaped for the projection's weight gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mesa_train.stash import VIEW, Cast, Replay, Stash

from .fallback import fallback

if TYPE_CHECKING:
    from mesa_train.intercept import Interception

_CAST = Cast()


def view(mode: Interception, func: Any, /, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Row of views and of copies of views."""
    output = func(input, *args, **kwargs)
    source = mode.lineage.get(input) if isinstance(input, Tensor) else None
    if source is None or _has_tensor(args) or _has_tensor(kwargs.values()):
        return output
    if isinstance(output, Tensor):
        _derive(mode, output, source, Replay(func, args, kwargs))
    elif isinstance(output, (tuple, list)):
        for index, part in enumerate(output):
            _derive(mode, part, source, Replay(func, args, kwargs, index))
    return output


def pad(mode: Interception, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of F.pad. For every mode but "constant" PyTorch saves the input, to the hooks of the
    fallback."""
    output = fallback(mode, func, (input, *args), kwargs)
    source = mode.lineage.get(input)
    if source is not None and not _has_tensor(args) and not _has_tensor(kwargs.values()):
        _derive(mode, output, source, Replay(func, args, kwargs))
    return output


def cast(mode: Interception, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of dtype conversions (and moves to the device a tensor is on)."""
    if "memory_format" in kwargs:
        # A view behind it may rely on the new layout, which a cast of codes does not have.
        return NotImplemented
    output = func(input, *args, **kwargs)
    source = mode.lineage.get(input)
    if (
        source is not None
        and output is not input
        and output.is_floating_point()
        and output.device == input.device
    ):
        stash = Stash(_CAST, (), (source,), cost=VIEW, dtype=output.dtype)
        mode.lineage.set(output, stash)
    return output


def _derive(mode: Interception, output: Tensor, source: Stash, recipe: Replay) -> None:
    if mode.lineage.get(output) is None:
        mode.lineage.set(output, Stash(recipe, (), (source,), cost=VIEW, dtype=source.dtype))


def _has_tensor(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (tuple, list)) and _has_tensor(value):
            return True
    return False
