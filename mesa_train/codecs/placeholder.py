"""Codecs for activation checkpointing, non-reentrant and selective.

A non-reentrant checkpoint passes every saved tensor of its first pass to a hook, which keeps only
the tensor's shape. The recompute must then save tensors of the same shape and dtype in the same
order. So the first pass saves placeholders: one element, expanded to the codes' shapes. So no
element is coded twice.

A selective checkpoint (`create_selective_checkpoint_contexts`) also counts the operations of both
passes, and calls its policy for each operation. The user wrote this policy for the model, and codes
are no part of the model. So the operations that make codes are hidden from the checkpoint. The two
passes may then differ in these operations, and a policy that saves everything saves no codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from .lossless import Lossless

_SELECTIVE: tuple[type, ...] = (
    torch.utils.checkpoint._CachingTorchDispatchMode,
    torch.utils.checkpoint._CachedTorchDispatchMode,
)


class SACHiddenCodec:
    """`codec` with operations that a selective checkpoint does not see.

    The recipe holds `codec` itself.
    """

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        with unseen():
            return self.codec.encode(x)

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:
        with unseen():
            return self.codec.encode_normalized(x, mean, rstd)


class PlaceholderCodec:
    """`codec` with placeholders of the codes' shapes instead of codes.

    The recipe holds `codec` itself.
    """

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.codec, Lossless):
            return self.codec.encode(x)
        with unseen():
            return tuple([_like(x, *s) for s in self.codec.shapes(*x.shape)])

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        with unseen():
            shapes = self.codec.shapes(*x.shape, normalized_from=x.dtype)
            return tuple([_like(x, *s) for s in shapes])


def bits(mask: Tensor) -> Tensor:
    """A placeholder for `bitmask.encode(mask)`."""
    with unseen():
        return _like(mask, ((mask.numel() + 7) // 8,), torch.uint8)


def discards(pack: Any) -> bool:
    """True if a pack hook belongs to the first pass of a non-reentrant checkpoint."""
    return _is_checkpoints(pack, "_checkpoint_hook.")


def _is_checkpoints(pack: Any, owner: str) -> bool:
    """True if a pack hook is a method of torch's checkpoint class `owner`."""
    return (
        pack is not None
        and getattr(pack, "__module__", None) == "torch.utils.checkpoint"
        and pack.__qualname__.startswith(owner)
    )


def recomputes(pack: Any) -> bool:
    """True if a pack hook belongs to the recompute of a non-reentrant checkpoint."""
    return _is_checkpoints(pack, "_recomputation_hook.")


def selective() -> bool:
    """True if a selective checkpoint is active, in its first pass or its recompute."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any([isinstance(m, _SELECTIVE) for m in _get_current_dispatch_mode_stack()])


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Context manager: remove the modes of selective checkpoints. Other modes stay active."""
    if not selective():
        yield
        return
    # PyTorch's own modes (fake tensors, tracing) are below the modes of users on the stack. They
    # have a `_mode_key`.
    stack = [m for m in _get_current_dispatch_mode_stack() if getattr(m, "_mode_key", None) is None]
    others = [m for m in stack if not isinstance(m, _SELECTIVE)]
    _exchange(len(stack), others)
    try:
        yield
    finally:
        _exchange(len(others), stack)


def _exchange(count: int, modes: list[Any]) -> None:
    """Replace the top `count` modes of the dispatch mode stack by `modes`."""
    for _ in range(count):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A placeholder: one element on x's device, expanded to `shape`."""
    return torch.empty((), dtype=dtype, device=x.device).expand(shape)
