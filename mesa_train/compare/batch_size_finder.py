"""The largest batch that fits: on a straight line through computed peaks, or by trying.

A step's bytes are a part that does not depend on the batch (copies of weights, gradients) and a
part that grows with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


def largest_batch_on_a_line(
    peak: Callable[[int], int], room: int, guess: int, per_image: float, gradients: int
) -> int:
    """The largest batch whose peak is at most `room` bytes, taking the peak to be a straight line
    from where activations outweigh the rest.

    peak: bytes of a step by batch size. It bends where the peak moves from the end of the backward,
    where all `gradients` are there, to its beginning, where all activations are (`per_image` bytes
    an image): so it is asked for two sizes beyond that, or near the first `guess`.
    """
    bend = int(4 * gradients / max(per_image, 1.0)) + 1
    first = max(1, min(bend, guess))
    second = 2 * first
    low, high = peak(first), peak(second)
    slope = (high - low) / (second - first)
    return max(0, int(second + (room - high) / slope)) if slope > 0 else second


def bisect(fits: Callable[[int], bool], guess: int, precision: float = 0.02) -> int:
    """The largest batch for which `fits`, to a relative `precision`; 0 if not even 1 does.

    Grows or halves from `guess`, then bisects: about ten trials.
    """
    low, size = 0, max(1, guess)
    while fits(size):
        low, size = size, max(size + 1, 2 * size)
    high = size
    while not low and high > 1:
        size = high // 2
        low, high = (size, high) if fits(size) else (0, size)
    while high - low > max(1, precision * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Tries(Protocol):
    """What trying needs of a bench."""

    device: torch.device
    job: dict[str, int]

    def resized(self, batch: int) -> object: ...

    def step(self, inputs: object) -> None: ...


def largest_batch_by_trying(bench: Tries, memory: int) -> int | None:
    """Bisect with real steps on a GPU limited to `memory` bytes; None where inputs have no batch
    dimension."""
    if bench.resized(1) is None:
        return None

    def fits(batch: int) -> bool:
        try:
            with limited(bench.device, memory):
                bench.step(bench.resized(batch))
        except torch.OutOfMemoryError:
            return False
        return True

    return bisect(fits, bench.job["batch_size"])


@contextlib.contextmanager
def limited(device: torch.device, memory: int) -> Iterator[None]:
    """Within the context the caching allocator of a GPU hands out at most `memory` bytes."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
