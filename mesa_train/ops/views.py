"""Functions that only move or relabel data, replayed on the source's stash: the result needs no
stash of its own.

One stored tensor then serves all its shapes: the attention output for the attention's backward, and
transposed and reshaped for the projection's weight gradient. Tensors joined by `cat` are rebuilt from
the stashes of the parts, so one matmul behind attention and an activation keeps neither twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import VIEW
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Cast, Replay, Saved, Spec, Stash

from .fallback import fallback

_CAST = Cast()


def view(recorder: Recorder, func: Any, /, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Row of views and of copies of views."""
    output = func(input, *args, **kwargs)
    source = recorder.lineage.get(input) if isinstance(input, Tensor) else None
    if source is None or _has_tensor(args) or _has_tensor(kwargs.values()):
        return output
    if isinstance(output, Tensor):
        _derive(recorder, output, source, Replay(func, args, kwargs))
    elif isinstance(output, (tuple, list)):
        for index, part in enumerate(output):
            _derive(recorder, part, source, Replay(func, args, kwargs, index))
    return output


class Joined:
    """Recipe: the sources, concatenated along `dim`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return torch.cat([saved.value(source, dtype) for source in spec.sources], self.dim)


def cat(recorder: Recorder, func: Any, /, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Row of torch.cat. Where the parts that have a stash are the larger share, the others get one
    now: coding the whole for the operator behind it would code the known parts a second time."""
    parts = tuple(tensors)
    if kwargs or not recorder.covers("linear", *parts):
        return NotImplemented
    output = func(parts, dim)
    sources = [recorder.lineage.get(part) for part in parts]
    known = sum([p.numel() for p, s in zip(parts, sources, strict=True) if s is not None])
    if (
        2 * known <= output.numel()
        or any([part.dtype is not output.dtype for part in parts])
        or not recorder.context.rules["linear", "input"].rebuild_cheap
    ):
        return output
    stashes = [
        recorder.keep(part, "linear", "input", label="cat") if source is None else source
        for part, source in zip(parts, sources, strict=True)
    ]
    stash = Stash(Joined(dim), (), tuple(stashes), cost=VIEW, dtype=output.dtype)
    recorder.lineage.set(output, stash)
    return output


def pad(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of F.pad. For every mode but "constant" PyTorch saves the input, to the hooks of the
    fallback."""
    output = fallback(recorder, func, (input, *args), kwargs)
    source = recorder.lineage.get(input)
    if source is not None and not _has_tensor(args) and not _has_tensor(kwargs.values()):
        _derive(recorder, output, source, Replay(func, args, kwargs))
    return output


def cast(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of dtype conversions (and moves to the device a tensor is on)."""
    if "memory_format" in kwargs:
        # A view behind it may rely on the new layout, which a cast of codes does not have.
        return NotImplemented
    output = func(input, *args, **kwargs)
    source = recorder.lineage.get(input)
    if (
        source is not None
        and output is not input
        and output.is_floating_point()
        and output.device == input.device
    ):
        stash = Stash(_CAST, (), (source,), cost=VIEW, dtype=output.dtype)
        recorder.lineage.set(output, stash)
    return output


def _derive(recorder: Recorder, output: Tensor, source: Stash, recipe: Replay) -> None:
    # A view in another dtype reads bits, which codes do not have.
    if recorder.lineage.get(output) is None and output.dtype is source.dtype:
        recorder.lineage.set(output, Stash(recipe, (), (source,), cost=VIEW, dtype=source.dtype))


def _has_tensor(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (tuple, list)) and _has_tensor(value):
            return True
    return False
