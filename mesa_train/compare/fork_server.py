"""Control the process that forks a child for every job: start, watch, pause and end a job.

`worker.py` is the code of that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time as clock
from collections.abc import Mapping
from typing import Any


class Server:
    """The process that forks a child for every job; a context manager.

    Call `start` in a thread that ends after its jobs: Linux ends the process with the thread that
    started it. If the process died, the next `begin` starts it again.

    Args:
        environment: variables beside the variables of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._lock = threading.Lock()
        self._child: int | None = None
        self._paused_at: float | None = None
        self._limit = self._end = 0.0
        self._closed = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed = True
        self._stop()
        self._errors.close()

    def start(self) -> None:
        """Start the process, which imports the packages of all jobs while the caller continues."""
        if self._closed:
            raise RuntimeError("this server is closed")
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "mesa_train.compare.worker"]
        # The user's own modules are imported from the current folder.
        path = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)  # noqa: PTH109
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**self._environment, **os.environ, "PYTHONPATH": path},
            # Ctrl-C in a terminal reaches only the caller, which ends this process and its jobs.
            start_new_session=True,
        )
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()

    def begin(self, job: dict[str, Any], limit_s: float) -> None:
        """Start a job.

        Args:
            job: the values that the worker reads.
            limit_s: most seconds of the job, without pauses.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._limit, self._end = limit_s, clock.monotonic() + limit_s
        self._errors.seek(0)
        self._errors.truncate()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def outcome(self, timeout: float) -> tuple[bool, str | None]:
        """Wait at most `timeout` seconds for the job.

        Returns:
            (whether the job has ended, the reason if it failed).
        """
        if self._paused_at is None and clock.monotonic() >= self._end:
            self._stop()
            return True, f"stopped after {self._limit:.0f} s"
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return False, None
        if line is None:
            self._stop()
            return True, f"its process could not start: {self._last_error()}"
        if self._child is None:
            with self._lock:
                self._child = int(line)
                if self._paused_at is not None:
                    self._signal(signal.SIGSTOP)
            return False, None
        self._child = None
        status = int(line)
        if status == -signal.SIGKILL:
            return True, "killed by the system, most likely out of memory"
        if status:
            return True, f"ended by signal or status {status}: {self._last_error()}"
        return True, None

    def busy(self) -> bool:
        """True if the job is running and has time left."""
        return self._lines.empty() and clock.monotonic() < self._end

    def extend(self, seconds: float) -> None:
        """Add seconds to the job's limit."""
        self._end += seconds

    def end(self) -> None:
        """End the job."""
        self._stop()

    def pause(self) -> None:
        """Stop the job and the processes that it started until `resume`."""
        with self._lock:
            self._paused_at = clock.monotonic()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the job; the pause does not count for its limit."""
        with self._lock:
            if self._paused_at is not None:
                self._end += clock.monotonic() - self._paused_at
            self._paused_at = None
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, which may be importing, and to its job.

        The job's own child processes get it too.
        """
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
        _signal_group(self._child, number)

    def _stop(self) -> None:
        """Kill the process and its job."""
        with self._lock:
            process, self._process = self._process, None
            child, self._child = self._child, None
        _signal_group(child, signal.SIGKILL)
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _last_error(self) -> str:
        """The last line that the process wrote to stderr."""
        if self._closed:
            return "the comparison was ended"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:300] if lines else "no message"


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put the lines of the process's stdout into a queue, then None."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # Closed while this thread waits.
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _signal_group(child: int | None, number: signal.Signals) -> None:
    """Send a signal to a job and its processes: the job leads a process group of its own."""
    if child is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, number)
