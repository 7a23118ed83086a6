"""The functions whose saved tensors the fallback may code.

The saved tensors of every other function stay exact. Some functions save a tensor, but their
backward reads only its size (pooling, padding, gather). For these functions the fallback saves the
size. A saved tensor may be coded in two cases: it enters the gradient linearly (products), or
measured gradients tolerate codes (`lstm`).

scripts/bench/fallback.py measures the gradient error of every differentiable function with codes,
for large arguments, offsets, coordinates and poles. docs/fallback.md lists the decisions. A
function that is not measured is not in this table: its saved tensors are the user's data, and it is
unknown how its backward uses them.

Functions are compared by identity. An operator of another library that is also called `mul` is a
different function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OWNERS = (torch, Tensor, F, torch._C._nn, torch.linalg, torch.fft)


@dataclasses.dataclass(frozen=True)
class Coded:
    """How a function's saved tensors may be saved.

    Attributes:
        sizes: the backward reads the sizes of the saved float tensors, but not their elements.
            Default False.
        masks: bool tensors are packed to bits, and float tensors stay exact. Default False.
        operands: names of the arguments that may be coded, in order from the first; None (default)
            for all saved tensors.
        row: the policy's operator of the row that declined the call. A policy that disables this
            operator leaves the function to PyTorch. None (default) if no row covers the function.
        when: whether a call with these arguments may be coded; None (default) for every call.
    """

    sizes: bool = False
    masks: bool = False
    operands: tuple[str, ...] | None = None
    row: str | None = None
    when: Callable[[Any, Any], bool] | None = None

    def among(self, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The tensors of a call that may be coded, or None for all saved tensors."""
        if self.operands is None:
            return None
        given = [kwargs.get(name, *args[i : i + 1]) for i, name in enumerate(self.operands)]
        return [tensor for tensor in given if isinstance(tensor, Tensor)]


def _whole_power(args: Any, kwargs: Any) -> bool:
    """True if the exponent is 2 or 3. Other derivatives have a pole or grow too fast."""
    exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
    return isinstance(exponent, (int, float)) and exponent in (2, 3)


# Apart from indices and masks, the backward reads only the sizes of the tensors that these
# functions save.
_SIZES = """
    max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
    fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
    fractional_max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    pad interpolate gather take take_along_dim masked_select
    fft rfft rfft2 rfftn
"""
# The gradient is linear in each saved tensor.
_LINEAR = """
    conv_tbc mv addmv addbmm addr dot vdot inner
    outer ger tensordot bilinear chain_matmul multi_dot kron cross lerp addcmul square
"""
# The same, but a row covers most calls. The fallback gets the other calls: vectors, unbatched
# inputs, several factors.
_DECLINED = {
    "linear": "linear",
    "conv": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "matmul": "matmul mm bmm addmm baddbmm einsum __matmul__ __rmatmul__",
}
_OTHERS = {
    "mul mul_ multiply multiply_": Coded(row="mul"),
    "where masked_fill masked_fill_ masked_scatter masked_scatter_": Coded(masks=True),
    "pow pow_ __pow__ __ipow__": Coded(when=_whole_power),
    # Gates and cells: products, and derivatives of sigmoid and tanh, which are computed from the
    # outputs.
    "lstm": Coded(),
    # Linear in the images. In the grid the function is piecewise, and the pieces are pixels.
    "grid_sample grid_sampler": Coded(operands=("input",)),
}


def _entries() -> Iterator[tuple[str, Coded]]:
    for name in _SIZES.split():
        yield name, Coded(sizes=True)
    for name in _LINEAR.split():
        yield name, Coded()
    for row, names in _DECLINED.items():
        for name in names.split():
            yield name, Coded(row=row)
    for names, coded in _OTHERS.items():
        for name in names.split():
            yield name, coded


# Keyed by the function object.
CODED: dict[Any, Coded] = {
    getattr(owner, name): coded
    for name, coded in _entries()
    for owner in _OWNERS
    if callable(getattr(owner, name, None))
}
