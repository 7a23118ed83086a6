"""What one operator's backward hands to the next within one run of the autograd engine."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class UseCount:
    """Counts the operators that may rebuild one stash: those that keep it and still live."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class UseHandle:
    """One of them. It may go without its backward, like a Linear whose product a layer scale took
    over."""

    __slots__ = ("uses",)

    def __init__(self, uses: UseCount) -> None:
        self.uses = uses
        uses.count += 1

    def __del__(self) -> None:
        self.uses.count -= 1


class BackwardCache(threading.local):
    """What one operator's backward made that the next one needs: a matmul rebuilt for both, or the
    activation's gradient that the Linear behind it had almost computed, with its sum over the rows for
    the bias in front.

    Lives inside one run of the autograd engine: an entry goes when its last user has taken it, and
    what is left goes with the engine's final callback, so nothing outlives the backward.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[UseCount, torch.dtype], tuple[Tensor, int]] = {}
        self.gradients: dict[tuple[int, int], tuple[Tensor, Tensor, int, Tensor]] = {}
        self.sums: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self.run = -1

    def take(self, uses: UseCount, dtype: torch.dtype) -> Tensor | None:
        found = self.values.pop((uses, dtype), None)
        if found is None:
            return None
        value, left = found
        if left > 1:
            self.values[uses, dtype] = value, left - 1
        return value

    def offer(self, uses: UseCount, dtype: torch.dtype, value: Tensor) -> None:
        self._enter()
        self.values[uses, dtype] = value, uses.count - 1

    def take_gradient(self, codes: Tensor, grad: Tensor) -> Tensor | None:
        """The gradient at a coded tensor that was handed over for this very `grad`."""
        if not torch._C._has_storage(grad):
            return None
        found = self.gradients.pop(_address(codes), None)
        if found is None:
            return None
        _, expected, version, value = found
        # What hooks or another user of the activation made of it is another tensor or version.
        same = (
            _address(expected) == _address(grad)
            and expected._version == version == grad._version
            and (expected.shape, expected.stride()) == (grad.shape, grad.stride())
            and expected.dtype is grad.dtype
        )
        return value if same else None

    def offer_gradient(self, codes: Tensor, grad: Tensor, value: Tensor) -> None:
        """Hand `value` to the operator that gets `grad` and kept `codes`; both are held, so their
        addresses stay theirs. Not under vmap (`is_grads_batched`), whose tensors have no address."""
        if not torch._C._has_storage(grad):
            return
        self._enter()
        self.gradients[_address(codes)] = codes, grad, grad._version, value

    def take_sum(self, grad: Tensor) -> Tensor | None:
        """The sum of this very `grad` over all its dims but the last, if whoever made it knew."""
        found = self.sums.pop(id(grad), None)
        if found is None or found[0]() is not grad or found[1] != grad._version:
            return None
        return found[2]

    def offer_sum(self, grad: Tensor, total: Tensor) -> None:
        """Hand `total` to the operator that gets `grad` as it is now; the gradient is not held."""
        self._enter()
        self.sums[id(grad)] = weakref.ref(grad), grad._version, total

    def _enter(self) -> None:
        # A run that ended in an error has not called its callback.
        run = torch._C._current_graph_task_id()
        if run != self.run:
            self._clear()
            self.run = run
            torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def _clear(self) -> None:
        self.values.clear()
        self.gradients.clear()
        self.sums.clear()


backward_cache = BackwardCache()


def _address(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins; fakes, which have none, are told apart too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
