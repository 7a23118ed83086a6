"""Measure methods side by side, each in a process of its own.

If a method runs out of memory, crashes or takes too long, its row has the reason. The next method
starts in a new process. A server process imports PyTorch once and forks a child for each method
(see `fork_server.py` and `worker.py`).

A compiled method spends most of its time in the compiler, on one core. So on a CPU of several cores
the compiled methods have a worker slot of their own. They compile and count their bytes while the
other methods count bytes with half of the threads: two jobs with all threads would wait for each
other's barriers. The peak is measured and steps are timed alone: the jobs take turns, and the other
slot is paused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import queue
import tempfile
import threading
import time as clock
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from mesa_train.methods.apply import PLAIN
from mesa_train.methods.spec import FLOAT32, MethodSpec

from .fork_server import Server

Row = dict[str, Any]

_MEMINFO = Path("/proc/meminfo")
# Share of a method's seconds for timed steps, if all methods together have a time limit.
_TIMING = 0.4
# The second worker slot needs this many times the resident memory of the first method.
_MEMORY_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """A comparison to measure.

    Args:
        model: the MODEL string, as for `load`.
        batch_size: as for `load`.
        image_size: as for `load`.
        device: as for `load`.
        dtype: dtype of autocast: "bfloat16", "float16" or None.
        rounds: timed steps of every method; 0 for no times.
        memory_bytes: bytes that the largest batch must fit, or None.
        limit_s: most seconds for one method.
        total_s: most seconds for all methods.
        threads: number of threads; None for torch's default.
    """

    model: str
    batch_size: int = 8
    image_size: int | None = None
    device: str = "cpu"
    dtype: str | None = "bfloat16"
    rounds: int = 5
    memory_bytes: int | None = None
    limit_s: float = 300.0
    total_s: float = math.inf
    threads: int | None = None


def measure(
    request: Request,
    methods: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
) -> Generator[Row, None, None]:
    """Measure the methods.

    The first process also writes the float32 gradient that all gradients are compared with.

    Args:
        request: the comparison.
        methods: names of the methods.
        progress: called with (running methods, number of finished methods, number of methods).

    Yields:
        A row for each method when it is finished, which may be another order than of `methods`. If
            a method failed, its row has the reason as "note".

    Raises:
        ValueError: a method is unknown or there is none, or the model fails without any method.
    """
    if not methods:
        raise ValueError(f"a comparison needs a method; choose from {FLOAT32}, plain, or a preset")
    for method in methods:
        MethodSpec.of(method)
    report = progress or (lambda *_: None)
    with (
        tempfile.TemporaryDirectory(prefix="mesa_train_") as folder,
        contextlib.ExitStack() as stack,
    ):
        servers = [stack.enter_context(Server(_inductor(request.device))) for _ in range(2)]
        bench = _Bench(request, methods, Path(folder), servers)
        stack.callback(bench.close)
        bench.start()
        measured = False
        for done in range(len(methods)):
            row = bench.next(functools.partial(_report_running, report, done, len(methods)))
            broken = row.pop("broken", False)
            if broken and not measured and MethodSpec.of(row["method"]).variant == PLAIN:
                raise ValueError(
                    f"{request.model} fails by itself, without any method: {row['note']}"
                )
            measured = measured or not broken
            yield row
        report("done", len(methods), len(methods))


def _report_running(
    report: Callable[[str, int, int], None], done: int, total: int, running: str
) -> None:
    """Call `report` with the running methods first."""
    report(running, done, total)


class _Bench:
    """The rows of one comparison, measured in one or two worker slots."""

    def __init__(
        self, request: Request, methods: Sequence[str], folder: Path, servers: Sequence[Server]
    ) -> None:
        self.request, self.methods, self.folder, self.servers = request, methods, folder, servers
        self.reference = folder / "reference.pt"
        self.end = clock.monotonic() + request.total_s
        self.two = request.device == "cpu" and (os.cpu_count() or 1) > 1
        numbers = range(len(methods))
        compiled = [n for n in numbers if self.two and MethodSpec.of(methods[n]).compiled]
        # Numbers of the methods for the first slot alone, and for either slot.
        self.first_slot = [n for n in numbers if n not in compiled]
        self.either_slot = compiled
        self.running: dict[Server, str] = {}
        self.rows: queue.Queue[Row | BaseException] = queue.Queue()
        self.taking, self.timing = threading.Lock(), threading.Lock()
        self.closed = False
        self.first: Row | None = None

    def start(self) -> None:
        """Start the slots. Servers start in this thread: Linux ends a server with its thread."""
        slots = self.servers if self.either_slot and len(self.methods) > 1 else self.servers[:1]
        for number, server in enumerate(slots):
            server.start()
            threading.Thread(target=self._slot, args=(server, number == 0), daemon=True).start()

    def close(self) -> None:
        """Start no more jobs."""
        self.closed = True

    def next(self, report: Callable[[str], None]) -> Row:
        """Wait for the next finished row; `report` is called with the running methods."""
        while True:
            with contextlib.suppress(queue.Empty):
                row = self.rows.get(timeout=0.1)
                if isinstance(row, BaseException):
                    raise row
                return row
            report(", ".join(list(self.running.values())))

    def _slot(self, server: Server, first: bool) -> None:
        """Measure methods until none is left."""
        try:
            if not first:
                self._wait_for_memory()
            while (number := self._take(first)) is not None:
                row = self._measured(server, number)
                self.first = self.first or row
                self.rows.put(row)
        except BaseException as error:  # Raised again where the rows are read.
            if not self.closed:
                self.rows.put(error)

    def _wait_for_memory(self) -> None:
        """Wait for the first row, which writes the reference, and for enough free memory."""
        while not self.closed and (self.first is None or not self.reference.exists()):
            clock.sleep(0.05)
            with self.taking:
                if not self.first_slot and not self.either_slot:
                    return
        needed = _MEMORY_FACTOR * (self.first or {}).get("resident_bytes", 0)
        while not self.closed and _available() < needed and self.either_slot:
            clock.sleep(0.5)

    def _take(self, first: bool) -> int | None:
        """The number of the next method; None if there is none."""
        with self.taking:
            if self.closed:
                return None
            waiting = self.first_slot if first and self.first_slot else self.either_slot
            return waiting.pop(0) if waiting else None

    def _measured(self, server: Server, number: int) -> Row:
        """Measure a method in a process of its own and return its row."""
        method = self.methods[number]
        why_not = MethodSpec.of(method).why_not(self.request.device)
        if why_not is not None:
            return self._row(method, None, why_not)
        remaining_s = self.end - clock.monotonic()
        over = f"{self.request.total_s:.0f} s for all methods were over"
        if remaining_s <= 0:
            return self._row(method, None, f"not begun: {over}")
        job = self._job(method, number)
        # A compiled method uses most of the other core. If both jobs use all threads, both wait.
        job["shares"] = bool(self.either_slot or self.running) and self.first is not None
        waiting = 1 + len(self.first_slot) + len(self.either_slot)
        # At least two steps are timed, however long they take. None means no limit: JSON has no
        # infinity.
        job["timing_s"] = None if math.isinf(remaining_s) else _TIMING * remaining_s / waiting
        self.running[server] = method
        server.begin(job, self.request.limit_s)
        ended, timed, reason = False, False, None
        while not ended:
            if not timed and Path(job["ready"]).exists():
                timed = True
                self._time(server, job)
            ended, reason = server.outcome(0.05)
            if not ended and clock.monotonic() >= self.end:
                server.end()
                ended, reason = True, f"stopped after {remaining_s:.0f} s: {over}"
        self.running.pop(server, None)
        return self._row(method, Path(job["result"]), reason)

    def _time(self, server: Server, job: Row) -> None:
        """Let a job measure its peak and time its steps while the other slot is paused."""
        others = [s for s in self.servers if s is not server]
        requested_at = clock.monotonic()
        with self.timing:
            server.extend(clock.monotonic() - requested_at)
            for other in others:
                other.pause()
            try:
                Path(job["go"]).touch()
                while server.busy() and not Path(job["timed"]).exists():
                    clock.sleep(0.02)
                    if clock.monotonic() >= self.end or self.closed:
                        break
            finally:
                for other in others:
                    other.resume()

    def _job(self, method: str, number: int) -> Row:
        """The values that a worker reads."""
        gates = {gate: str(self.folder / f"{number}.{gate}") for gate in ("ready", "go", "timed")}
        return {
            **dataclasses.asdict(self.request),
            "method": method,
            "reference": str(self.reference),
            "writes_reference": not self.reference.exists(),
            "result": str(self.folder / f"{number}.json"),
            "packages": _packages(self.request, method),
            **gates,
        }

    @staticmethod
    def _row(method: str, result: Path | None, reason: str | None) -> Row:
        """The row of a result file, with the reason if the job failed."""
        row: Row = {"method": method, "caveats": list(MethodSpec.of(method).caveats)}
        if result is not None and result.exists():
            row |= json.loads(result.read_text())
        return row if reason is None else {**row, "note": reason}


def _packages(request: Request, method: str) -> list[str]:
    """The packages to import before the fork, so that they are imported once."""
    scheme, colon, _ = request.model.partition(":")
    known = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}
    packages = [known[scheme]] if scheme in known else [] if colon else ["timm"]
    # On a GPU, the import of the compiler looks for the device, which breaks the fork.
    compiles = request.device == "cpu" and MethodSpec.of(method).compiled
    return [*packages, *(["torch._inductor.compile_fx"] if compiles else [])]


def _inductor(device: str) -> dict[str, str]:
    """On a CPU two methods may compile at once: each compiler gets half of the cores."""
    if device != "cpu":
        return {}
    threads = max(1, (os.cpu_count() or 1) // 2)
    return {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "TORCH_WARM_POOL": "0"}


def _available() -> float:
    """Bytes of CPU memory that are free or can be freed; infinite if they are not known."""
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf
