"""A cache for results that two operators share within one backward.

Some backward computations are needed twice: a recomputed matmul by two operators, or an
activation's gradient by the Linear behind it and the activation itself. The first operator puts the
result into the cache, and the second operator takes it.

Cost: a cached result stays in memory until its last reader has taken it. A result whose reader does
not run in this backward stays until the backward ends.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class UseCount:
    """Counts the readers of one stash in a backward.

    A reader is an operator that saved the stash. A second kind of reader is a stash that is rebuilt
    from this one. It counts once if it has a reader itself, because its own readers share it.

    Args:
        sources: the use counts of the stashes that the stash is rebuilt from.
    """

    __slots__ = ("count", "sources")

    def __init__(self, sources: tuple[UseCount, ...] = ()) -> None:
        self.count = 0
        self.sources = sources


class UseHandle:
    """One operator's entry in a `UseCount`.

    It is counted until it is deleted, because an operator may go without its backward. An example
    is a Linear whose output is multiplied by a layer scale: the operator of the layer scale
    computes both gradients.
    """

    __slots__ = ("uses",)

    def __init__(self, uses: UseCount) -> None:
        self.uses = uses
        counted = [uses]
        for one in counted:  # grows while it is read
            one.count += 1
            if one.count == 1:
                counted += one.sources

    def __del__(self) -> None:
        counted = [self.uses]
        for one in counted:
            one.count -= 1
            if one.count == 0:
                counted += one.sources


class BackwardCache(threading.local):
    """Results of one operator's backward that another operator's backward needs.

    These are recomputed matmuls that several operators need; gradients of an activation that the
    Linear behind it has almost computed; and the sums of these gradients over the rows, for the
    bias of the Linear in front.

    An entry is valid within one run of the autograd engine. It is removed when its last reader has
    taken it. The engine's final callback removes all other entries, so nothing outlives the
    backward. Outside of a run, rebuilt tensors are not cached.
    """

    def __init__(self) -> None:
        self.values: dict[UseCount, dict[torch.dtype, Tensor]] = {}
        # The readers that have not asked for a rebuilt tensor in this run.
        self.left: dict[UseCount, int] = {}
        self.gradients: dict[tuple[int, int], tuple[Tensor, Tensor, int, Tensor]] = {}
        self.sums: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self.run = -1

    def take(self, uses: UseCount, dtype: torch.dtype) -> Tensor | None:
        """A rebuilt tensor in `dtype`, or None, for one reader of its stash.

        The last reader removes the stash's tensors of all dtypes.
        """
        run = torch._C._current_graph_task_id()
        if run == -1:
            return None
        if run != self.run:
            self._enter()
        left = self.left[uses] = self.left.get(uses, uses.count) - 1
        values = self.values.get(uses) if left > 0 else self.values.pop(uses, None)
        return None if values is None else values.get(dtype)

    def offer(self, uses: UseCount, dtype: torch.dtype, value: Tensor) -> None:
        """Cache a rebuilt tensor, if its stash has readers that have not called `take`."""
        if self.left.get(uses, 0) > 0:
            self.values.setdefault(uses, {})[dtype] = value

    def take_gradient(self, codes: Tensor, grad: Tensor) -> Tensor | None:
        """The cached gradient of a coded tensor, or None.

        None if the cached gradient was not computed for this same `grad`.
        """
        if not torch._C._has_storage(grad):
            return None
        found = self.gradients.pop(_address(codes), None)
        if found is None:
            return None
        _, expected, version, value = found
        # Hooks, or another user of the activation, would have made another tensor or another
        # version.
        same = (
            _address(expected) == _address(grad)
            and expected._version == version == grad._version
            and (expected.shape, expected.stride()) == (grad.shape, grad.stride())
            and expected.dtype is grad.dtype
        )
        return value if same else None

    def offer_gradient(self, codes: Tensor, grad: Tensor, value: Tensor) -> None:
        """Cache `value` for the operator that receives `grad` and saved `codes`.

        The cache holds both tensors, so their addresses stay valid. Does nothing under vmap
        (`is_grads_batched`), because its tensors have no address.
        """
        if not torch._C._has_storage(grad):
            return
        self._enter()
        self.gradients[_address(codes)] = codes, grad, grad._version, value

    def take_sum(self, grad: Tensor) -> Tensor | None:
        """The cached sum of this same `grad` over all dims but the last, or None."""
        found = self.sums.pop(id(grad), None)
        if found is None or found[0]() is not grad or found[1] != grad._version:
            return None
        return found[2]

    def offer_sum(self, grad: Tensor, total: Tensor) -> None:
        """Cache `total` for the operator that receives `grad` at its present version.

        `grad` is held weakly.
        """
        self._enter()
        self.sums[id(grad)] = weakref.ref(grad), grad._version, total

    def _enter(self) -> None:
        """Clear the entries of an earlier engine run, and register this run's final callback."""
        # A run that ended in an error has not called its callback.
        run = torch._C._current_graph_task_id()
        if run != self.run:
            self._clear()
            self.run = run
            torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def _clear(self) -> None:
        self.values.clear()
        self.left.clear()
        self.gradients.clear()
        self.sums.clear()


backward_cache = BackwardCache()


def _address(tensor: Tensor) -> tuple[int, int]:
    """The start of a tensor's memory. Distinguishes fake tensors too, which have no memory."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
