"""The lineage: which stash stands for which live tensor, so that neighbouring operators share stashes."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .sharded_parameters import is_zero3_alias

Entry = TypeVar("Entry")


class Lineage(Generic[Entry]):
    """Which stash stands for which live tensor. Valid for that very tensor and only while its
    version is unchanged.

    Tensors are held weakly: an entry goes with its tensor.

    zero3_hooked: also know a tensor after ZeRO-3 has passed it on (see `is_zero3_alias`): the same memory
        at the same version, under a new name.
    """

    def __init__(self, zero3_hooked: bool = False) -> None:
        self._entries: dict[Any, tuple[Any, int, Entry]] = {}
        self._placed: dict[int, tuple[Any, int, Tensor, Entry]] | None = (
            {} if zero3_hooked else None
        )

    def get(self, tensor: Tensor) -> Entry | None:
        """The tensor's stash, or None if it has none or was written to since."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return self._by_place(tensor) if self._placed else None
        return entry[2] if entry[1] == tensor._version else None

    def _by_place(self, tensor: Tensor) -> Entry | None:
        assert self._placed is not None
        if not is_zero3_alias(tensor):
            return None
        placed = self._placed.get(tensor.data_ptr())
        if placed is None:
            return None
        storage, version, layout, stash = placed
        same = (
            not storage.expired()
            and version == tensor._version
            and layout.dtype is tensor.dtype
            and (layout.shape, layout.stride()) == (tensor.shape, tensor.stride())
        )
        return stash if same else None

    def set(self, tensor: Tensor, stash: Entry) -> None:
        """Let `stash` stand for `tensor` as it is now."""
        if tensor.is_inference():
            return  # it has no version
        if self._placed is not None:
            storage = StorageWeakRef(tensor.untyped_storage())
            layout = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            self._placed[tensor.data_ptr()] = storage, tensor._version, layout, stash
        self._enter(id(tensor), tensor, stash)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Entry | None:
        """The stash of `tensor` rounded to `dtype`, which cannot stand for the tensor itself."""
        entry = self._entries.get((id(tensor), dtype))
        if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
            return None
        return entry[2]

    def set_cast(self, tensor: Tensor, dtype: torch.dtype, stash: Entry) -> None:
        """Let `stash` stand for `tensor` as it is now, rounded to `dtype`."""
        if not tensor.is_inference():
            self._enter((id(tensor), dtype), tensor, stash)

    def _enter(self, key: Any, tensor: Tensor, stash: Entry) -> None:
        entries = self._entries
        entries[key] = weakref.ref(tensor, lambda _: entries.pop(key, None)), tensor._version, stash

    def clear(self) -> None:
        """Drop all that is known."""
        self._entries.clear()
        if self._placed is not None:
            self._placed.clear()


class TracedLineage(Lineage[Entry]):
    """The lineage of a frame that torch.compile traces. There are no weak references and no versions to ask
    for; whoever writes in place clears everything."""

    def __init__(self) -> None:
        super().__init__()
        self._traced: dict[Tensor, Entry] = {}
        self._casts: dict[tuple[Tensor, torch.dtype], Entry] = {}

    def get(self, tensor: Tensor) -> Entry | None:
        return self._traced.get(tensor)

    def set(self, tensor: Tensor, stash: Entry) -> None:
        self._traced[tensor] = stash

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Entry | None:
        return self._casts.get((tensor, dtype))

    def set_cast(self, tensor: Tensor, dtype: torch.dtype, stash: Entry) -> None:
        self._casts[tensor, dtype] = stash

    def clear(self) -> None:
        self._traced.clear()
        self._casts.clear()
