"""Offload: stashes that wait in CPU memory between forward and backward.

As soon as a leaf's tensors are made they are copied to pinned memory on a stream of their own, and on
the way back through the model they are copied back ahead of their use. What autograd keeps are the
copies in CPU memory, through `save_for_backward` like everything else, so that freeing, a second
backward and `retain_graph` are what they always are. Codes of 8 bits take half of the bus that
bfloat16 tensors take. On a GPU alone: a CPU's tensors are in CPU memory already, and are not copied.

Nothing waits on the host. A tensor of the device is given up only after the stream that it was
allocated for has been told to wait for the copy, so that whoever gets its memory next comes after it;
the caching allocator needs to know nothing (`Tensor.record_stream` would put memory off limits for as
long as the host runs ahead of the device). At most `WINDOW` leaves are on their way out at any time,
and as many on their way back ahead of their use: that is the device memory it takes, and where the bus is
slower than the arithmetic, the arithmetic waits.

What is kept in a checkpoint's recompute is used at once, and stays; under somebody else's saved-tensor
hooks (`save_on_cpu`) it is theirs to move.
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

# Leaves on their way at once, out or back: about half of a transformer's block.
WINDOW = 4

Tensors = tuple[Tensor, ...]
Pack = TypeVar("Pack", bound=Callable[..., Any])


class OffloadedStash:
    """One leaf's way out and back. Holds device tensors only while they are on their way out; those in
    CPU memory are the graph's."""

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
        """Give the device tensors up."""
        if self.leaving:
            self.offload_stream.wait(self.ticket)
            self.leaving = ()

    def __del__(self) -> None:
        # The graph went without a backward.
        if not sys.is_finalizing():
            self.landed()


# The leaves of one forward, in the order that they were made.
Order = list["weakref.ref[OffloadedStash]"]


class Reader(UseHandle):
    """An operator that reads a offloaded leaf in its backward."""

    __slots__ = ("offloaded",)

    def __init__(self, offloaded: OffloadedStash) -> None:
        super().__init__(offloaded.uses)
        self.offloaded = offloaded


class _Arrival:
    """Tensors on the device again, for so many readers of this backward."""

    __slots__ = ("left", "tensors", "ticket")

    def __init__(self, tensors: Tensors, ticket: Any, left: int) -> None:
        self.tensors, self.ticket, self.left = tensors, ticket, left


class OffloadStream(abc.ABC):
    """The traffic between a device and CPU memory. Subclasses say how a copy is made; when, and for
    how long its tensors are held, is said here."""

    def __init__(self) -> None:
        self._leaving: deque[weakref.ref[OffloadedStash]] = deque()
        # Of one run of the autograd engine: what has come back, and what all readers have taken.
        self._run = -1
        self._arrived: dict[OffloadedStash, _Arrival] = {}
        self._taken: set[OffloadedStash] = set()

    @abc.abstractmethod
    def out(self, tensors: Tensors) -> tuple[Tensors, Any]:
        """Begin to copy device tensors to CPU memory: the copies, and a ticket to `wait` with."""

    @abc.abstractmethod
    def prefetch(self, tensors: Sequence[Tensor], after: Any) -> tuple[Tensors, Any]:
        """Begin to copy them back, once `after` has come: the device tensors and a ticket."""

    @abc.abstractmethod
    def wait(self, ticket: Any, tensors: Sequence[Tensor] = ()) -> None:
        """Whatever is computed from now on, on `tensors` too, comes after the ticket's copy."""

    def send(self, tensors: Tensors, order: Order) -> tuple[Tensors, OffloadedStash]:
        """Move a leaf out: its tensors in CPU memory, and its way back.

        order: of the forward's leaves; this one is appended.
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
        """A leaf's tensors on the device, for one of its readers; what left before it follows."""
        if torch._C._current_graph_task_id() == -1:
            tensors, ticket = self.prefetch(host, offloaded.ticket)
            self.wait(ticket)
            return tensors
        self._enter()
        arrival = self._arrived.get(offloaded) or self._call(offloaded, host)
        self.wait(arrival.ticket, arrival.tensors)
        arrival.left -= 1
        if arrival.left <= 0:
            del self._arrived[offloaded]
            self._taken.add(offloaded)
        self._call_ahead(offloaded)
        return arrival.tensors

    def _call(self, offloaded: OffloadedStash, host: Sequence[Tensor]) -> _Arrival:
        tensors, ticket = offloaded.leaving, offloaded.ticket
        if tensors:
            offloaded.leaving = ()
        else:
            tensors, ticket = self.prefetch(host, offloaded.ticket)
        arrival = _Arrival(tensors, ticket, offloaded.uses.count)
        self._arrived[offloaded] = arrival
        return arrival

    def _call_ahead(self, offloaded: OffloadedStash) -> None:
        """Call the leaves that left just before this one, which the backward comes to next."""
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
        # A run that ended in an error has not called its callback; one inside of another starts anew.
        run = torch._C._current_graph_task_id()
        if run != self._run:
            self._clear()
            self._run = run
            torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def _clear(self) -> None:
        for arrival in self._arrived.values():
            self.wait(arrival.ticket)
        self._arrived.clear()
        self._taken.clear()


class Ticket(NamedTuple):
    """A copy's end, and the stream that its device tensors were allocated for."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream


class CudaOffloadStream(OffloadStream):
    """Two streams of a GPU, one for each direction of the bus, and PyTorch's cache of pinned memory."""

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
        # This memory may have been somebody's whose work is still queued.
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
    """For tensors without data: what is out lies on the meta device, and takes none of the memory that
    is counted."""

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
    """The offload_stream between a device and CPU memory; None where there is nothing to move.

    Raises RuntimeError while torch.compile traces: a compiled graph keeps what its partitioner saves,
    which is out of reach.
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
    raise RuntimeError(
        "mesa_train: offload=True moves what operators keep one by one, which torch.compile does not "
        "let happen; set offload=False, or leave the model uncompiled"
    )


# Called while tracing instead of traced, so that it is an error and no graph break: pieces of a graph
# would not move anything in order. As torch.compiler.assume_constant_result (see `ops/fallback.py`).
_refuse._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def through(offload_stream: OffloadStream | None) -> Iterator[None]:
    """Within the context what is offloaded takes `offload_stream`, whatever device it is on; None changes
    nothing."""
    if offload_stream is None:
        yield
        return
    _instead.append(offload_stream)
    try:
        yield
    finally:
        _instead.remove(offload_stream)


def onlooker(pack: Pack) -> Pack:
    """Mark a saved-tensor pack hook that reads no data: what is offloaded may pass through it."""
    pack.mesa_train_onlooker = True  # type: ignore[attr-defined]
    return pack


def passes(pack: Any) -> bool:
    """Whether what is offloaded may pass through a pack hook, None for none: others read it, or move it
    themselves."""
    return pack is None or hasattr(pack, "mesa_train_onlooker")
