"""The lossless codec: saves the tensor itself.

It is used for `bits=32` and for tests. It also shows whether an error comes from a codec or from a
bug.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lossless:
    """Codes are the values, in full precision. They are not copied if the layout allows a view."""

    def __str__(self) -> str:
        return "lossless"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The detached tensor."""
        return (x.detach(),)

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:
        """(x - mean) * rstd, with mean and rstd (rows,), at least in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(wide) if mean is None else x.to(wide) - mean[:, None]
        return (centred * rstd[:, None],)

    def shapes(
        self, rows: int, cols: int, normalized_from: torch.dtype
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the normalised form of a (rows, cols) tensor."""
        return [((rows, cols), torch.promote_types(normalized_from, torch.float32))]

    def decode(
        self,
        tensors: Sequence[Tensor],
        cols: int,  # noqa: ARG002
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(rows, cols) in `dtype`, times weight (cols,) plus bias (cols,)."""
        value = tensors[0]
        if weight is not None:
            value = value * weight
        if bias is not None:
            value = value + bias
        return value.to(dtype)
