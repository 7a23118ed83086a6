"""Views: functions that only move or relabel data. The result needs no stash of its own.

The function is replayed on the source's stash. So one stored tensor serves all its shapes. For
example, the attention's backward reads the attention output, and the weight gradient of the
projection reads it transposed and reshaped.

Tensors joined by `cat` or `stack` are rebuilt from the stashes of the parts. So one matmul behind attention
and an activation saves neither part twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import VIEW
from mesa_train.stash.recipes import Cast, Replay
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash

from .fallback import fallback

_CAST = Cast()


def view(recorder: Recorder, func: Any, /, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Row of views and of copies of views."""
    output = func(input, *args, **kwargs)
    source = recorder.lineage.get(input) if isinstance(input, Tensor) else None
    if source is None or _has_tensor(args) or _has_tensor(kwargs.values()):
        return output
    if isinstance(output, Tensor):
        if func is Tensor.view and output.dtype is input.dtype:
            func = Tensor.reshape  # a rebuilt source may have other strides
        _derive(recorder, output, source, Replay(func, args, kwargs))
    elif isinstance(output, (tuple, list)):
        for index, part in enumerate(output):
            _derive(recorder, part, source, Replay(func, args, kwargs, index))
    return output


class Joined:
    """Recipe: the sources, joined along `dim` by `function`, torch.cat or torch.stack."""

    def __init__(self, dim: int, function: Any = torch.cat) -> None:
        self.dim, self.function = dim, function

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return self.function([saved.value(source, dtype) for source in spec.sources], self.dim)


def cat(recorder: Recorder, func: Any, /, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Row of torch.cat and torch.stack.

    If the parts that have a stash are the larger share, the other parts get a stash now. Otherwise
    the operator behind would code the joined tensor, and so code the known parts a second time.
    """
    parts = tuple(tensors)
    if kwargs or not recorder.covers("linear", *parts):
        return NotImplemented
    output = func(parts, dim)
    joined = torch.stack if func is torch.stack else torch.cat
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
    stash = Stash(Joined(dim, joined), (), tuple(stashes), cost=VIEW, dtype=output.dtype)
    recorder.lineage.set(output, stash)
    return output


def pad(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of F.pad.

    For every mode but "constant", PyTorch saves the input, and the fallback's hooks get it.
    """
    output = fallback(recorder, func, (input, *args), kwargs)
    source = recorder.lineage.get(input)
    if source is not None and not _has_tensor(args) and not _has_tensor(kwargs.values()):
        _derive(recorder, output, source, Replay(func, args, kwargs))
    return output


def cast(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Row of dtype conversions, and of moves to the device that a tensor is on."""
    if "memory_format" in kwargs:
        # A later view may rely on the new layout, which a cast of codes does not have.
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
    """Give `output` a stash that replays `recipe` on `source`."""
    # A view in another dtype reads the bits of the values, and codes do not contain these bits.
    if recorder.lineage.get(output) is None and output.dtype is source.dtype:
        recorder.lineage.set(output, Stash(recipe, (), (source,), cost=VIEW, dtype=source.dtype))


def _has_tensor(values: Any) -> bool:
    """True if a tensor is among values or inside their containers."""
    for value in values:
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (tuple, list)) and _has_tensor(value):
            return True
    return False
