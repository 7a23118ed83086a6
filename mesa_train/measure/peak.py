"""The peak of a real step: most bytes allocated at once while it runs.

On a GPU the caching allocator keeps that number. On the CPU the profiler reports every allocation
and release, and the peak is the highest running sum; what math libraries allocate behind PyTorch's
back is not in it, so the highest resident-set size of the process stands beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler import profile

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Peak:
    """allocated_bytes: beyond what was allocated before the step. resident_bytes: the process's
    highest resident set in the step, all of it; None where the system does not tell."""

    allocated_bytes: int
    resident_bytes: int | None


def peak_of(step: Callable[[], object], device: torch.device) -> Peak:
    """Run `step` once and return its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, resident_peak())
    reset_resident_peak()
    with profile(use_cpu=True, profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return Peak(highest, resident_peak())


def resident_peak() -> int | None:
    """The highest resident-set size since the process began or the last reset, in bytes."""
    return _status("VmHWM")


def resident() -> int | None:
    """The resident-set size now, in bytes."""
    return _status("VmRSS")


def reset_resident_peak() -> None:
    """Forget the highest resident set so far, where the system allows that."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
