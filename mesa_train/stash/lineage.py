"""Lineage: a map from live tensors to stashes, so that neighbouring operators share stashes.

An operator looks up the tensor that it wants to save. If the tensor has a stash already, the
operator saves this stash and stores nothing new.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .sharded_parameters import is_zero3_alias

Entry = TypeVar("Entry")


class Lineage(Generic[Entry]):
    """Maps live tensors to their stashes.

    An entry is valid for that same tensor, and only while the tensor's version is unchanged.
    Tensors are held weakly: an entry is removed with its tensor.

    Args:
        zero3_hooked: also find a ZeRO-3 alias of a tensor (see `is_zero3_alias`). An alias is a new
            tensor object with the same memory at the same version. Default False.
    """

    def __init__(self, zero3_hooked: bool = False) -> None:
        self._entries: dict[Any, tuple[Any, int, Entry]] = {}
        self._placed: dict[int, tuple[Any, int, Tensor, Entry]] | None = (
            {} if zero3_hooked else None
        )

    def get(self, tensor: Tensor) -> Entry | None:
        """The tensor's stash, or None if it has no stash or was written to since."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return self._by_place(tensor) if self._placed else None
        return entry[2] if entry[1] == tensor._version else None

    def _by_place(self, tensor: Tensor) -> Entry | None:
        """The stash of a ZeRO-3 alias, found by its memory address."""
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
        """Record `stash` as the stash of `tensor` at its present version."""
        if tensor.is_inference():
            return  # an inference tensor has no version
        if self._placed is not None:
            storage = StorageWeakRef(tensor.untyped_storage())
            layout = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            self._placed[tensor.data_ptr()] = storage, tensor._version, layout, stash
        self._enter(id(tensor), tensor, stash)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Entry | None:
        """The stash of `tensor` rounded to `dtype`. It cannot replace the tensor itself."""
        entry = self._entries.get((id(tensor), dtype))
        if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
            return None
        return entry[2]

    def set_cast(self, tensor: Tensor, dtype: torch.dtype, stash: Entry) -> None:
        """Record `stash` as the stash of `tensor`, at its present version, rounded to `dtype`."""
        if not tensor.is_inference():
            self._enter((id(tensor), dtype), tensor, stash)

    def _enter(self, key: Any, tensor: Tensor, stash: Entry) -> None:
        """Add an entry that is removed together with its tensor."""
        entries = self._entries
        entries[key] = weakref.ref(tensor, lambda _: entries.pop(key, None)), tensor._version, stash

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        if self._placed is not None:
            self._placed.clear()


class TracedLineage(Lineage[Entry]):
    """The lineage of a frame that torch.compile traces.

    A traced frame has no weak references and no tensor versions. So each operator that writes in
    place clears the whole lineage.
    """

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
