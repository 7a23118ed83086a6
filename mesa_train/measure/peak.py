"""Measure the peak memory of a real step: the most bytes allocated at once while the step runs.

On a GPU the caching allocator counts that number. On the CPU the profiler reports every allocation
and release, and the peak is the highest running sum. Math libraries also allocate memory that
PyTorch does not see. Therefore the highest resident-set size of the process is reported too.

The workspace is the memory that kernels allocate inside themselves and free before they return.
Fake tensors do not show it. `workspace_of` measures it at the moments of a timeline in one real
step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile, record_function

from .timeline import BACKWARD, FORWARD, Timeline, module_hooks

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Peak:
    """The peak memory of one step.

    Args:
        allocated_bytes: most bytes allocated at once, beyond the bytes allocated before the step.
        resident_bytes: highest resident-set size of the whole process in the step; None if the
            system does not report it.
    """

    allocated_bytes: int
    resident_bytes: int | None


def peak_of(step: Callable[[], object], device: torch.device) -> Peak:
    """Run `step` once and return its peak.

    Args:
        step: runs one step.
        device: device of the model.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, resident_peak())
    reset_resident_peak()
    with profile(use_cpu=True, profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    allocated = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        highest = max(highest, allocated)
    return Peak(highest, resident_peak())


def resident_peak() -> int | None:
    """The highest resident-set size since the process began or the last reset, in bytes."""
    return _status("VmHWM")


def resident() -> int | None:
    """The resident-set size now, in bytes."""
    return _status("VmRSS")


def available() -> int:
    """Bytes that the system can still give to processes; 0 if the system does not report them."""
    if not _MEMORY.exists():
        return 0
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_resident_peak() -> None:
    """Reset the highest resident-set size, if the system allows it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None if there is no such file or field."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


# Bytes by (phase, module).
Workspace = Mapping[tuple[str, str], int]
_MARK = "mesa_train mark "


def workspace_of(
    model: nn.Module, step: Callable[[], object], device: torch.device, counted: Timeline
) -> Workspace:
    """Bytes that a real step allocates at once beyond the bytes counted on fake tensors, by moment.

    Args:
        model: the model that `step` runs.
        step: runs one step.
        device: device of the model.
        counted: timeline of the same step on fake tensors.

    Returns:
        Bytes by (phase, module), at least 0.
    """
    real = _highest(real_moments(model, step, device))
    counts = _highest(((m.phase, m.module), m.peak_bytes) for m in counted.moments)
    return {key: max(0, size - counts[key]) for key, size in real.items() if key in counts}


def real_moments(
    model: nn.Module, step: Callable[[], object], device: torch.device
) -> list[tuple[tuple[str, str], int]]:
    """Most bytes allocated at once in each moment of one real step.

    Returns:
        ((phase, module), bytes beyond the bytes allocated before the step), one entry a moment.
    """
    marks = _CudaMarks(device) if device.type == "cuda" else _Marks()
    with module_hooks(model, marks):
        return marks.run(step)


class _Marks:
    """On a CPU: the profiler's allocations; events in the profile separate the moments."""

    def __init__(self) -> None:
        self.keys = [(FORWARD, "")]

    def mark(self, phase: str, module: str) -> None:
        """Begin a moment."""
        with record_function(f"{_MARK}{len(self.keys)}"):
            self.keys.append((phase, module))

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        self.mark(FORWARD, module)

    def leave(self, module: str) -> None:
        pass

    def arrive(self, module: str, _left: Any) -> None:
        """The gradient of a module's output arrives."""
        self.mark(BACKWARD, module)

    def run(self, step: Callable[[], object]) -> list[tuple[tuple[str, str], int]]:
        """Run `step` and return ((phase, module), most bytes) of its moments."""
        with profile(use_cpu=True, profile_memory=True) as profiled:
            step()
        events = profiled.kineto_results.events()
        moments: list[tuple[tuple[str, str], int]] = []
        allocated = highest = number = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                allocated += event.nbytes()
                highest = max(highest, allocated)
            elif event.name().startswith(_MARK):
                moments.append((self.keys[number], highest))
                number = int(event.name().removeprefix(_MARK))
                highest = allocated
        return [*moments, (self.keys[number], highest)]


class _CudaMarks(_Marks):
    """On a GPU: the numbers of the caching allocator, without a synchronisation of the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.before = device, 0
        self.moments: list[tuple[tuple[str, str], int]] = []

    def mark(self, phase: str, module: str) -> None:
        """End the current moment and begin the next."""
        self._close()
        self.keys.append((phase, module))

    def run(self, step: Callable[[], object]) -> list[tuple[tuple[str, str], int]]:
        """Run `step` and return ((phase, module), most bytes) of its moments."""
        self.before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self._close()
        return self.moments

    def _close(self) -> None:
        """Read and reset the allocator's peak."""
        highest = torch.cuda.max_memory_allocated(self.device) - self.before
        self.moments.append((self.keys[-1], highest))
        torch.cuda.reset_peak_memory_stats(self.device)


def _highest(
    moments: Iterable[tuple[tuple[str, str], int]],
) -> dict[tuple[str, str], int]:
    """The largest size of each (phase, module)."""
    highest: dict[tuple[str, str], int] = {}
    for key, size in moments:
        highest[key] = max(size, highest.get(key, 0))
    return highest
