"""Functions whose saved tensors the fallback may code; what every other function saves stays exact.

Some functions save a tensor whose size alone the backward reads (pooling, padding, gather): the
size is kept. A saved tensor may be coded if it enters the gradient linearly (products), or if measured
gradients tolerate codes (`lstm`).
scripts/bench/fallback.py measures the gradient error of every differentiable function with codes, for
large arguments, offsets, coordinates and poles; docs/fallback.md lists the decisions. A function
that is not measured is not in this table: its saved tensors are the user's data, and nothing is known
of how its backward uses them.

Functions are found by identity: a library's operator that is called `mul` too is another function.
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
    """How a function's saved tensors may be kept.

    sizes: the backward reads the sizes of the saved float tensors and not their elements.
    masks: bools are packed, and floats stay exact.
    operands: names of the arguments that may be coded, in order from the first; None for whatever is saved.
    row: the policy's operator of the row that declined the call; a policy that disables the operator
        leaves the function to PyTorch. None if no row covers the function.
    when: whether a call with these arguments may be coded; None for every call.
    """

    sizes: bool = False
    masks: bool = False
    operands: tuple[str, ...] | None = None
    row: str | None = None
    when: Callable[[Any, Any], bool] | None = None

    def among(self, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The tensors of a call that may be coded; None for every one that is saved."""
        if self.operands is None:
            return None
        given = [kwargs.get(name, *args[i : i + 1]) for i, name in enumerate(self.operands)]
        return [tensor for tensor in given if isinstance(tensor, Tensor)]


def _whole_power(args: Any, kwargs: Any) -> bool:
    """Whether the exponent is 2 or 3. Other derivatives have a pole or grow too fast."""
    exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
    return isinstance(exponent, (int, float)) and exponent in (2, 3)


# Beside indices and masks, the backward reads the sizes of what these save.
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
    conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc mv addmv addbmm addr dot vdot inner
    outer ger tensordot bilinear chain_matmul multi_dot kron cross lerp addcmul square
"""
# The same, and a row covers most calls: the fallback meets vectors, unbatched input, several factors.
_DECLINED = {
    "linear": "linear",
    "conv": "conv1d conv2d conv3d",
    "matmul": "matmul mm bmm addmm baddbmm einsum __matmul__ __rmatmul__",
}
_OTHERS = {
    "mul mul_ multiply multiply_": Coded(row="mul"),
    "where masked_fill masked_fill_ masked_scatter masked_scatter_": Coded(masks=True),
    "pow pow_ __pow__ __ipow__": Coded(when=_whole_power),
    # Gates and cells: products, and derivatives of sigmoid and tanh read from their outputs.
    "lstm": Coded(),
    # Linear in the pictures; in the grid it is piecewise, and the pieces are pixels.
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


# By the function itself.
CODED: dict[Any, Coded] = {
    getattr(owner, name): coded
    for name, coded in _entries()
    for owner in _OWNERS
    if callable(getattr(owner, name, None))
}
