"""The host's part of a Triton operator: what is decided once for a call site, and the launch.

A step calls an operator at the same sites with the same shapes, strides, dtypes and constants. The
checks, the tiles, the shapes of the outputs and the compiled kernel depend on these properties
only. So an operator is written as a function that prepares: it checks its arguments and returns the
function that allocates the outputs and launches the kernels. `per_site` calls it once for each
combination of properties.

Cost: 1 to 2 us a call for the properties, and about 2 KiB of host memory for each combination.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Sites that an operator keeps. A model has about twenty for each image size.
SITES = 1024


def per_site(
    free: int = 0,
) -> Callable[[Callable[P, Callable[P, R]]], Callable[P, R]]:
    """Make an operator of a function that prepares it.

    The prepared function is cached by the device, by dtype, shape, strides and alignment of each
    tensor, and by the other arguments. It gets the same arguments as the operator. It must not keep
    a tensor, because it stays in the cache. The cache holds `SITES` functions. A new function
    replaces the oldest one.

    Args:
        free: how many of the last arguments are not part of the key (a seed, a factor). The
            prepared function must read these from its own arguments.
    Returns:
        The decorator. What the decorated function raises is raised at each call.
    """
    stop = -free or None

    def decorate(prepare: Callable[P, Callable[P, R]]) -> Callable[P, R]:
        sites: dict[Hashable, Callable[..., R]] = {}
        lock = threading.Lock()

        @functools.wraps(prepare)
        def operator(*args: Any) -> R:
            properties = [
                (a.dtype, a.shape, a.stride(), a.data_ptr() % 16) if isinstance(a, Tensor) else a
                for a in args[:stop]
            ]
            key = args[0].device, *properties
            found = sites.get(key)
            if found is None:
                found = cast("Callable[..., Callable[..., R]]", prepare)(*args)
                with lock:
                    while len(sites) >= SITES:
                        del sites[next(iter(sites))]
                    sites[key] = found
            return found(*args)

        return cast("Callable[P, R]", operator)

    return decorate


def outputs(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """A function that allocates tensors like these. It keeps shapes, strides, dtypes and devices."""
    makers = [
        functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device)
        for t in tensors
    ]
    return lambda: [make() for make in makers]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with contiguous memory, or None."""
    return None if tensor is None else tensor.contiguous()


def signed(seed: int) -> int:
    """The low 32 bits of a seed as an int32. All seeds have one type, so one kernel is compiled."""
    return ((seed + 2**31) & 0xFFFFFFFF) - 2**31


class Launch:
    """A kernel, its grid and its numbers, launched on the current device and stream.

    On every call, Triton finds the compiled kernel by binding all arguments. This takes longer than
    many of these kernels run. A `Launch` keeps the kernel that its first call compiled. So all its
    calls must have tensors of the same dtypes and alignment. Outputs are new tensors, which every
    allocator of PyTorch aligns.

    Args:
        kernel: the Triton kernel. Its parameters are tensors, numbers that vary from call to call,
            then `bound`.
        grid: the launch grid.
        num_warps: warps per program.
        bound: the numbers and the constexpr arguments, the same at every call.
    """

    __slots__ = ("_bound", "_grid", "_kernel", "_num_warps", "_run")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], num_warps: int, bound: tuple[Any, ...]
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._num_warps = num_warps
        self._bound = bound
        self._run: Callable[..., object] | None = None

    def __call__(self, *varying: Tensor | float | None) -> None:
        """Run the kernel with the arguments that vary."""
        run = self._run
        if run is not None:
            run(*varying, *self._bound)
            return
        compiled = first_run(self._kernel, self._grid, self._num_warps, (*varying, *self._bound))
        if compiled is not None:  # Triton's interpreter compiles nothing.
            self._run = compiled[self._grid]


def first_run(
    kernel: Any, grid: tuple[int, ...], num_warps: int, arguments: tuple[Any, ...]
) -> Any:
    """Compile and run a kernel. Returns the compiled kernel, or None from the interpreter.

    Rounding is specified (`reference.py`), so the fusion of products and sums is off.
    """
    return kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False)


def compiled(kernel: Any, num_warps: int, arguments: tuple[Any, ...]) -> Any:
    """The kernel that `first_run` would run with these arguments, or None from the interpreter."""
    return kernel.warmup(*arguments, grid=(1,), num_warps=num_warps, enable_fp_fusion=False)
