"""The CUDA side of a captured step: a side stream, a memory pool, captures.

All of a step's graphs share one pool, because they never run at the same time. A tensor that a
graph leaves for later (a loss, a gradient) stays referenced, so the pool does not reuse its memory.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mesa_train.utils.errors import one_line

from .checks import CaptureError, check_cuda

Result = TypeVar("Result")


class CudaGraphs:
    """Runs functions on a side stream, and captures them there.

    Args:
        device: a CUDA device.
    Raises:
        CaptureError: `device` is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        check_cuda(device)
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def eager(self, function: Callable[[], Result]) -> Result:
        """Run a function on the side stream, between the work of the current stream.

        The stream is the one that captures, because autograd runs a gradient's accumulation on the
        stream of its first use.
        """
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            result = function()
        now.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture a function. No kernel runs.

        Args:
            function: reads and writes static tensors only.
        Returns:
            (replay, what the function returned).
        """
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self.device)
        # The outer context restores the stream, which torch.cuda.graph leaves after an error.
        # Other threads (the data loader's pinning) may use CUDA: "thread_local".
        with (
            torch.cuda.stream(now),
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            result = function()
        return graph.replay, result


def captured(
    backend: Any, function: Callable[[], Result], what: str
) -> tuple[Callable[[], None], Result]:
    """`backend.capture(function)`, with an error of one line.

    Args:
        backend: a `CudaGraphs`.
        function: what to capture.
        what: a name for the message, such as "the forward and backward".
    Returns:
        (replay, what the function returned).
    Raises:
        CaptureError: PyTorch cannot capture the function, or the function draws random numbers on
            the host, which a graph would repeat in every replay.
    """
    raised: list[Exception] = []

    def watched() -> Result:
        try:
            return function()
        except Exception as error:
            raised.append(error)
            raise

    before = _host_random()
    try:
        replay, result = backend.capture(watched)
    except Exception as error:
        # The end of a broken capture raises an error of its own over the cause.
        cause = raised[0] if raised else error
        raise CaptureError(
            f"PyTorch cannot capture {what}: {one_line(cause)}; a captured step must not read the "
            "device on the host (.item(), .cpu(), boolean indexing, an if on a tensor) or copy "
            "between CPU and GPU; change this line or train without a capture"
        ) from cause
    drawn = [name for name, state in _host_random().items() if state != before.get(name, state)]
    if drawn:
        raise CaptureError(
            f"{what} draws from the generator of {drawn[0]}, and a graph would repeat the same "
            "draw in every step; draw on the GPU, or outside of the step"
        )
    return replay, result


def _host_random() -> dict[str, Any]:
    """The states of the host's random generators, by the name of the library."""
    states: dict[str, Any] = {
        "Python's random": random.getstate(),
        "torch on the CPU": torch.get_rng_state().tolist(),
    }
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        _, numbers, *position = numpy.random.get_state()
        states["numpy.random"] = (numbers.tolist(), position)
    return states
