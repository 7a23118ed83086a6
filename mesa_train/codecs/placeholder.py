"""Stands in for a codec where the codes would be thrown away: the first pass of a non-reentrant checkpoint.

Such a checkpoint hands every saved tensor to a hook that keeps its shape alone, and demands tensors of
the same shape and dtype in the same order from the recompute. So the first pass saves placeholders of
one element, expanded to the codes' shapes, and no element is coded twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .lossless import Lossless

_SELECTIVE = "_CachingTorchDispatchMode"


class Placeholder:
    """`codec`, with tensors of the right shapes for codes. `codec` itself goes into the recipe."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.codec, Lossless):
            return self.codec.encode(x)
        return tuple([_like(x, *s) for s in self.codec.shapes(*x.shape)])

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        return tuple([_like(x, *s) for s in self.codec.shapes(*x.shape, normalized_from=x.dtype)])


def bits(mask: Tensor) -> Tensor:
    """In place of `bitmask.encode(mask)`."""
    return _like(mask, ((mask.numel() + 7) // 8,), torch.uint8)


def discards(pack: Any) -> bool:
    """Whether a pack hook is that of a non-reentrant checkpoint's first pass. Not of a selective one,
    which counts operations: both of its passes must run the same."""
    return (
        pack is not None
        and getattr(pack, "__module__", None) == "torch.utils.checkpoint"
        and pack.__qualname__.startswith("_checkpoint_hook.")
        and not any([type(m).__name__ == _SELECTIVE for m in _get_current_dispatch_mode_stack()])
    )


def _like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device=x.device).expand(shape)
