"""Contenders side by side, each measured in a process of its own.

A method that runs out of memory, crashes or takes too long becomes a row with its reason, and the
next one starts clean. One server process imports PyTorch once and forks a child a method (see
`worker.py`).

Compiling takes most of the time of a method that compiles, and one core. So on a CPU two such methods
compile side by side and count their bytes; each waits until both have, and is then timed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time as clock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mesa_train.memory.contenders import FLOAT32, Contender

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is measured.

    model, batch_size, image_size, device: as for `load`. dtype: autocast's, "bfloat16", "float16"
    or None. rounds: timed steps of every method, 0 for no times. memory_bytes: what the largest
    batch has to fit, or None. limit_s: most seconds for one method, total_s: for all of them.
    threads: None for torch's own.
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
) -> Iterator[Row]:
    """A row a method, in their order, as they come; "note" holds the reason where one failed.

    The first process also writes the float32 gradient that all are compared with.

    Raises ValueError for an unknown method or none at all.
    """
    if not methods:
        raise ValueError(f"a comparison needs a method; choose from {FLOAT32}, plain, or a preset")
    for method in methods:
        Contender.of(method)
    tell = progress or (lambda *_: None)
    with (
        tempfile.TemporaryDirectory(prefix="mesa_train_") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = _Bench(request, Path(folder), [stack.enter_context(_Server()) for _ in range(2)])
        done = 0
        while done < len(methods):
            group = bench.together(methods[done:])
            tell(", ".join(group), done, len(methods))
            yield from bench.rows(group, done)
            done += len(group)
        tell("done", len(methods), len(methods))


class _Bench:
    """The rows of one comparison."""

    def __init__(self, request: Request, folder: Path, servers: Sequence[_Server]) -> None:
        self.request, self.folder, self.servers = request, folder, servers
        self.reference = folder / "reference.pt"
        self.end = clock.monotonic() + request.total_s

    def together(self, methods: Sequence[str]) -> list[str]:
        """The first of these methods, and the next where both compile on a CPU of several cores."""
        first, following = methods[0], methods[1:2]
        pair = [first, *following]
        apart = (
            self.request.device != "cpu"
            or (os.cpu_count() or 1) < 2
            or not self.reference.exists()
            or not all(Contender.of(method).compiled for method in pair)
        )
        return [first] if apart else pair

    def rows(self, methods: Sequence[str], number: int) -> list[Row]:
        """The rows of one method, or of several that are made ready side by side; `number` is that of
        the first."""
        left = self.end - clock.monotonic()
        if left <= 0:
            over = f"not begun: {self.request.total_s:.0f} s were over"
            return [{"method": method, "note": over} for method in methods]
        jobs = [self._job(method, number + i, len(methods) > 1) for i, method in enumerate(methods)]
        reasons: list[str | None] = [None] * len(jobs)

        def run(index: int) -> None:
            limit = min(self.request.limit_s, left)
            reasons[index] = self.servers[index].run(jobs[index], limit)

        if len(jobs) == 1:
            run(0)
        else:
            threads = [
                threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))
            ]
            for thread in threads:
                thread.start()
            for thread, job in zip(threads, jobs, strict=True):
                while thread.is_alive() and not Path(job["ready"]).exists():
                    clock.sleep(0.05)
            for thread, job in zip(threads, jobs, strict=True):
                Path(job["go"]).touch()
                thread.join()
        return [self._row(job, reason) for job, reason in zip(jobs, reasons, strict=True)]

    def _job(self, method: str, number: int, waits: bool) -> Row:
        gates = {gate: str(self.folder / f"{number}.{gate}") for gate in ("ready", "go") if waits}
        return {
            **dataclasses.asdict(self.request),
            "method": method,
            "reference": str(self.reference),
            "writes_reference": not self.reference.exists(),
            "result": str(self.folder / f"{number}.json"),
            "packages": _packages(self.request.model),
            **gates,
        }

    @staticmethod
    def _row(job: Row, reason: str | None) -> Row:
        result = Path(job["result"])
        row = json.loads(result.read_text()) if result.exists() else {"method": job["method"]}
        return row if reason is None else {**row, "note": reason}


def _packages(model: str) -> list[str]:
    """What is imported before the fork, so that it is imported once."""
    scheme, colon, _ = model.partition(":")
    if not colon:
        return ["timm"]
    return {"timm": ["timm"], "hf": ["transformers"], "torchvision": ["torchvision"]}.get(
        scheme, []
    )


class _Server:
    """The process that forks children; started when first needed, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()
        self._errors.close()

    def run(self, job: Row, limit_s: float) -> str | None:
        """Do one job; None, or why it did not end well."""
        process = self._started()
        assert process.stdin is not None
        end = clock.monotonic() + limit_s
        self._errors.seek(0)
        self._errors.truncate()
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        child = self._answer(end)
        try:
            status = self._answer(end)
        except BaseException:
            # An interrupt here is no reason to leave a child behind.
            _kill(child)
            raise
        if child is None or status is None:
            _kill(child)
            self._stop()
            if clock.monotonic() >= end:
                return f"stopped after {limit_s:.0f} s"
            return f"its process could not start: {self._last_error()}"
        if status == -signal.SIGKILL:
            return "killed by the system, most likely out of memory"
        return None if status == 0 else f"ended by signal or status {status}: {self._last_error()}"

    def _answer(self, end: float) -> int | None:
        """The next number that the server says, None when it died or time is up."""
        try:
            line = self._lines.get(timeout=max(0.0, end - clock.monotonic()))
        except queue.Empty:
            return None
        return None if line is None else int(line)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "mesa_train.memory.worker"]
            # The user's own modules are imported from where the command runs.
            path = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)  # noqa: PTH109
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            self._lines = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:300] if lines else "no message"


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed while waiting
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _kill(child: int | None) -> None:
    """End a job and whatever it started: it leads its own group."""
    if child is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
