"""Offload: stashes are stored in CPU memory between forward and backward.

Why: codes in CPU memory take no device memory. Codes of 8 bits transfer half of the bytes that
bfloat16 tensors transfer. This works on a GPU only; a CPU's tensors are in CPU memory already and
are not copied.

How: a leaf's tensors are copied to pinned memory on a separate stream, as soon as they are made. In
the backward they are prefetched, that is, copied back before they are used. autograd saves the
copies in CPU memory through `save_for_backward`, so freeing, a second backward and `retain_graph`
work as usual.

Order: the host waits for nothing. A device tensor is freed only after its allocation stream was
made to wait for the copy. So the next user of this memory runs after the copy, and the caching
allocator needs no further information. `Tensor.record_stream` would instead block the memory for as
long as the host runs ahead of the device.

Cost: device memory for at most `WINDOW` leaves that are being offloaded, and for as many that are
prefetched. If the transfer is slower than the computation, the computation waits.

Tensors saved in a checkpoint's recompute are used at once, so they stay on the device. Under other
saved-tensor hooks (`save_on_cpu`), these hooks move the tensors.
"""

from __future__ import annotations

import abc
import contextlib
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .backward_cache import UseCount, UseHandle

# Leaves that are in transfer at once, in each direction: about half of a transformer's block.
WINDOW = 4

Tensors = tuple[Tensor, ...]
Pack = TypeVar("Pack", bound=Callable[..., Any])


class OffloadedStash:
    """The transfers of one offloaded leaf.

    Holds device tensors only while they are being copied to CPU memory. The autograd graph holds
    the copies in CPU memory.
    """

    __slots__ = (
        "__weakref__",
        "host",
        "index",
        "leaving",
        "offload_stream",
        "order",
        "ticket",
        "uses",
    )

    def __init__(
        self,
        offload_stream: OffloadStream,
        tensors: Tensors,
        host: Tensors,
        ticket: Any,
        order: Order,
    ) -> None:
        self.offload_stream, self.leaving, self.ticket = offload_stream, tensors, ticket
        self.host = [weakref.ref(t) for t in host]
        self.uses = UseCount()
        self.order, self.index = order, len(order)
        order.append(weakref.ref(self))

    def landed(self) -> None:
        """Free the device tensors after the copy to CPU memory."""
        if self.leaving:
            self.offload_stream.wait(self.ticket)
            self.leaving = ()

    def __del__(self) -> None:
        # The graph was freed without a backward.
        if not sys.is_finalizing():
            self.landed()


# The leaves of one forward, in the order in which they were made.
Order = list["weakref.ref[OffloadedStash]"]


class Reader(UseHandle):
    """An operator that reads an offloaded leaf in its backward."""

    __slots__ = ("offloaded",)

    def __init__(self, offloaded: OffloadedStash) -> None:
        super().__init__(offloaded.uses)
        self.offloaded = offloaded


class _Arrival:
    """Prefetched tensors on the device, and how many readers of this backward still need them."""

    __slots__ = ("left", "tensors", "ticket")

    def __init__(self, tensors: Tensors, ticket: Any, left: int) -> None:
        self.tensors, self.ticket, self.left = tensors, ticket, left


class OffloadStream(abc.ABC):
    """The transfers between a device and CPU memory.

    Subclasses implement the copies. This class decides when a copy starts and how long its tensors
    are held.
    """

    def __init__(self) -> None:
        self._leaving: deque[weakref.ref[OffloadedStash]] = deque()
        # Within one run of the autograd engine: leaves that were prefetched, and leaves that all
        # readers have taken.
        self._run = -1
        self._arrived: dict[OffloadedStash, _Arrival] = {}
        self._taken: set[OffloadedStash] = set()

    @abc.abstractmethod
    def out(self, tensors: Tensors) -> tuple[Tensors, Any]:
        """Start to copy device tensors to CPU memory.

        Returns the copies, and a ticket for `wait`.
        """

    @abc.abstractmethod
    def prefetch(self, tensors: Sequence[Tensor], after: Any) -> tuple[Tensors, Any]:
        """Start to copy tensors back after the ticket `after`.

        Returns the device tensors and a ticket.
        """

    @abc.abstractmethod
    def wait(self, ticket: Any, tensors: Sequence[Tensor] = ()) -> None:
        """Make all later computation run after the ticket's copy, also computation on `tensors`."""

    def send(self, tensors: Tensors, order: Order) -> tuple[Tensors, OffloadedStash]:
        """Offload a leaf.

        Args:
            tensors: the leaf's tensors on the device.
            order: the leaves of the forward; this leaf is appended.
        Returns:
            The tensors in CPU memory, and the `OffloadedStash` that copies them back.
        """
        host, ticket = self.out(tensors)
        offloaded = OffloadedStash(self, tensors, host, ticket, order)
        self._leaving.append(order[-1])
        while len(self._leaving) > WINDOW:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                oldest.landed()
        return host, offloaded

    def fetch(self, offloaded: OffloadedStash, host: Sequence[Tensor]) -> Tensors:
        """Return a leaf's tensors on the device for one of its readers.

        Also prefetches the leaves that were made just before it.

        Args:
            offloaded: the leaf.
            host: its tensors in CPU memory.
        Returns:
            The tensors on the device.
        """
        if torch._C._current_graph_task_id() == -1:
            tensors, ticket = self.prefetch(host, offloaded.ticket)
            self.wait(ticket)
            return tensors
        self._enter()
        arrival = self._arrived.get(offloaded) or self._call(offloaded, host)
        self.wait(arrival.ticket, arrival.tensors)
        self._read(offloaded, arrival)
        self._call_ahead(offloaded)
        return arrival.tensors

    def skip(self, offloaded: OffloadedStash) -> None:
        """Count a reader that needs no fetch, because another reader rebuilt the tensor for it.

        Args:
            offloaded: the leaf.
        """
        arrival = self._arrived.get(offloaded)
        if arrival is not None:
            self._read(offloaded, arrival)

    def _read(self, offloaded: OffloadedStash, arrival: _Arrival) -> None:
        """Count a reader of a leaf. Forget the device tensors after the last reader."""
        arrival.left -= 1
        if arrival.left <= 0 or offloaded in self._taken:
            del self._arrived[offloaded]
            self._taken.add(offloaded)

    def _call(self, offloaded: OffloadedStash, host: Sequence[Tensor]) -> _Arrival:
        """Start the prefetch of a leaf, or reuse device tensors that are not freed yet."""
        tensors, ticket = offloaded.leaving, offloaded.ticket
        if tensors:
            offloaded.leaving = ()
        else:
            tensors, ticket = self.prefetch(host, offloaded.ticket)
        arrival = _Arrival(tensors, ticket, offloaded.uses.count)
        self._arrived[offloaded] = arrival
        return arrival

    def _call_ahead(self, offloaded: OffloadedStash) -> None:
        """Prefetch the leaves that were offloaded just before this one.

        The backward reads them next.
        """
        ahead = 0
        for index in range(offloaded.index - 1, -1, -1):
            following = offloaded.order[index]()
            if (
                following is None
                or following.offload_stream is not self
                or following in self._taken
            ):
                continue
            host = [reference() for reference in following.host]
            own = [h for h in host if h is not None]
            if following not in self._arrived and len(own) == len(host):
                self._call(following, own)
            ahead += 1
            if ahead == WINDOW:
                return

    def _enter(self) -> None:
        """Clear the state of an earlier engine run, and register the final callback of this run."""
        # A run that ended in an error has not called its callback. A run inside another run starts
        # with an empty state.
        run = torch._C._current_graph_task_id()
        if run != self._run:
            self._clear()
            self._run = run
            torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def _clear(self) -> None:
        """Wait for all open copies, and forget them."""
        for arrival in self._arrived.values():
            self.wait(arrival.ticket)
        self._arrived.clear()
        self._taken.clear()


class Ticket(NamedTuple):
    """The end of a copy, and the stream for which its device tensors were allocated."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream


class CudaOffloadStream(OffloadStream):
    """Two streams of a GPU, one per direction, with PyTorch's cache of pinned memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.to_cpu, self.to_device = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def out(self, tensors: Tensors) -> tuple[Tensors, Ticket]:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "mesa_train: a CUDA graph cannot capture what offload=True moves; set offload=False"
            )
        now = torch.cuda.current_stream(self.device)
        self.to_cpu.wait_stream(now)
        with torch.cuda.stream(self.to_cpu):
            host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            return tuple(host), Ticket(self.to_cpu.record_event(), now)

    def prefetch(self, tensors: Sequence[Tensor], after: Ticket) -> tuple[Tensors, Ticket]:
        now = torch.cuda.current_stream(self.device)
        found = tuple([torch.empty_like(t, device=self.device) for t in tensors])
        # The previous owner of this memory may still have queued work.
        self.to_device.wait_stream(now)
        self.to_device.wait_event(after.event)
        with torch.cuda.stream(self.to_device):
            for tensor, source in zip(found, tensors, strict=True):
                tensor.copy_(source, non_blocking=True)
            return found, Ticket(self.to_device.record_event(), now)

    def wait(self, ticket: Ticket, tensors: Sequence[Tensor] = ()) -> None:
        ticket.stream.wait_event(ticket.event)
        now = torch.cuda.current_stream(self.device)
        if now != ticket.stream:
            now.wait_event(ticket.event)
            for tensor in tensors:
                tensor.record_stream(now)


class CountedOffloadStream(OffloadStream):
    """Offload for fake tensors.

    Offloaded tensors are on the meta device, so they are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def out(self, tensors: Tensors) -> tuple[Tensors, None]:
        return tuple([torch.empty_like(t, device="meta") for t in tensors]), None

    def prefetch(self, tensors: Sequence[Tensor], after: None) -> tuple[Tensors, None]:  # noqa: ARG002
        return tuple([torch.empty_like(t, device=self.device) for t in tensors]), None

    def wait(self, ticket: None, tensors: Sequence[Tensor] = ()) -> None:
        pass


_offload_streams: dict[int, CudaOffloadStream] = {}
_instead: list[OffloadStream] = []


def offload_stream_of(device: torch.device) -> OffloadStream | None:
    """The offload stream of a device.

    Args:
        device: the device of the tensors.
    Returns:
        The stream, or None if tensors of this device are not offloaded.
    Raises:
        RuntimeError: torch.compile traces. A compiled graph saves the tensors that its partitioner
            chooses, and mesa_train cannot offload these.
    """
    if not _instead and device.type != "cuda":
        return None
    if torch.compiler.is_compiling():
        _refuse()
    if _instead:
        return _instead[-1]
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _offload_streams:
        _offload_streams[index] = CudaOffloadStream(torch.device("cuda", index))
    return _offload_streams[index]


def _refuse() -> None:
    """Raise the error for offload under torch.compile."""
    raise RuntimeError(
        "mesa_train: offload=True moves what operators keep one by one, which torch.compile does not "
        "let happen; set offload=False, or leave the model uncompiled"
    )


# Dynamo calls this function while tracing, and does not trace it. So the call raises an error
# instead of breaking the graph: pieces of a graph would offload in no order. The mark is the one of
# torch.compiler.assume_constant_result (see `ops/fallback.py`).
_refuse._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def through(offload_stream: OffloadStream | None) -> Iterator[None]:
    """Context manager: offload through `offload_stream`, for tensors of any device.

    None changes nothing.
    """
    if offload_stream is None:
        yield
        return
    _instead.append(offload_stream)
    try:
        yield
    finally:
        _instead.remove(offload_stream)


def onlooker(pack: Pack) -> Pack:
    """Mark a saved-tensor pack hook as one that reads no data.

    Offloaded tensors may pass through a marked hook.
    """
    pack.mesa_train_onlooker = True  # type: ignore[attr-defined]
    return pack


def passes(pack: Any) -> bool:
    """True if offloaded tensors may pass through a pack hook (None: no hook).

    Hooks without the mark read the data or move the tensors themselves.
    """
    return pack is None or hasattr(pack, "mesa_train_onlooker")
