"""The narrow codec: saves a float32 or float64 tensor in bfloat16, 2 bytes an element.

The relative error of every element is at most 1/256, whatever the other elements are. The affine codec
bounds the error relative to the largest element of a group. So this codec is for tensors whose small
elements matter, such as the output of `exp`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Narrow:
    """Codes are the values in bfloat16. A finite float64 beyond the range of bfloat16 saturates."""

    def __str__(self) -> str:
        return "bfloat16"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(rows, cols) in bfloat16."""
        x = x.detach()
        if x.dtype is torch.float64:
            most = torch.finfo(torch.bfloat16).max
            x = torch.where(x.isfinite(), x.clamp(-most, most), x)
        return (x.to(torch.bfloat16),)

    def shapes(
        self,
        rows: int,
        cols: int,
        normalized_from: torch.dtype | None = None,  # noqa: ARG002
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the codes of a (rows, cols) tensor."""
        return [((rows, cols), torch.bfloat16)]

    def decode(
        self,
        tensors: Sequence[Tensor],
        cols: int,  # noqa: ARG002
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(rows, cols) in `dtype`, times weight (cols,) plus bias (cols,)."""
        value = tensors[0].to(dtype)
        if weight is not None:
            value = value * weight
        return value if bias is None else value + bias
