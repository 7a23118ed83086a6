"""Recipes that rebuild a tensor from one source: a view, a computing function, a cast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stash import Saved, Spec


class Replay:
    """Recipe: call a view function on one source again, with constant arguments.

    `geometry`: the view's sizes and strides, if a native row made the recipe.
    """

    __slots__ = ("args", "function", "geometry", "index", "kwargs")

    def __init__(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None = None
    ) -> None:
        self.function, self.args, self.kwargs, self.index = function, args, kwargs, index
        self.geometry: bytes | None = None

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        value = self.function(saved.value(spec.sources[0], dtype), *self.args, **self.kwargs)
        return value if self.index is None else value[self.index]


class Recompute(Replay):
    """Recipe: call a computing function on one source again, in the dtype of the forward."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return super().load(saved, spec, spec.sources[0].dtype).to(dtype)


# The dtypes that codes are decoded to. Any other dtype is a cast of one of these.
_DECODED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Cast:
    """Recipe: the source in another dtype, rounded as the forward's cast was."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        source, own = spec.sources[0], spec.dtype
        if own.itemsize >= 4 and own.itemsize > source.dtype.itemsize:
            return saved.value(source, dtype)  # A cast to a wider dtype changes no value.
        value = saved.value(source, own if own in _DECODED else source.dtype)
        return value.to(own).to(dtype)
