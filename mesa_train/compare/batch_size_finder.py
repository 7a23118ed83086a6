"""Find the largest batch that fits: on a straight line through computed peaks, or by trying.

The bytes of a step have two parts. One does not depend on the batch (copies of weights, gradients),
the other grows with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


def largest_batch_on_a_line(
    peak: Callable[[int], int], budget_bytes: int, guess: int, per_image: float, gradients: int
) -> int:
    """Find the largest batch whose peak is at most `budget_bytes`, from the peaks of two batches.

    The peak grows on a straight line if the activations are larger than the gradients. In smaller
    batches the peak is at the end of the backward, when all gradients exist. In larger batches it
    is at the beginning of the backward, when all activations exist. So `peak` is called for two
    batches beyond this bend, or near `guess` if `guess` is smaller.

    Args:
        peak: bytes of a step by batch size.
        budget_bytes: most bytes of the peak.
        guess: first batch to try, in images.
        per_image: bytes of the activations of an image.
        gradients: bytes of all gradients.

    Returns:
        The batch; 0 if not even one image fits.
    """
    bend = int(4 * gradients / max(per_image, 1.0)) + 1
    first = max(1, min(bend, guess))
    second = 2 * first
    first_peak, second_peak = peak(first), peak(second)
    slope = (second_peak - first_peak) / (second - first)
    return max(0, int(second + (budget_bytes - second_peak) / slope)) if slope > 0 else second


def bisect(fits: Callable[[int], bool], guess: int, precision: float = 0.02) -> int:
    """Find the largest batch for which `fits` is true; 0 if not even 1 fits.

    The search doubles or halves from `guess`, then bisects: about ten trials.

    Args:
        fits: whether a batch fits.
        guess: first batch to try.
        precision: relative precision of the result.
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
    """The part of a benchmark that `largest_batch_by_trying` uses."""

    device: torch.device
    job: dict[str, int]

    def resized(self, batch: int) -> object: ...

    def step(self, inputs: object) -> None: ...


def largest_batch_by_trying(bench: Tries, memory: int) -> int | None:
    """Bisect with real steps on a GPU that is limited to `memory` bytes.

    Args:
        bench: the method to try.
        memory: bytes that the GPU may allocate.

    Returns:
        The largest batch; None if an input has no batch dimension.
    """
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
    """Within the context, the caching allocator of a GPU allocates at most `memory` bytes."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
