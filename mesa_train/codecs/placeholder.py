"""Codecs under activation checkpointing: what the first pass of a non-reentrant one would throw away is not
coded, and a selective one does not see the operations that make codes.

Such a checkpoint hands every saved tensor to a hook that keeps its shape alone, and demands tensors of
the same shape and dtype in the same order from the recompute. So the first pass saves placeholders of
one element, expanded to the codes' shapes, and no element is coded twice.

A selective checkpoint (`create_selective_checkpoint_contexts`) also counts the operations of both passes
and asks its policy about each. Codes are no part of the model that the policy was written for, so they are
made out of its sight: the passes may then differ in them, and a policy that keeps everything keeps no codes.
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
    """`codec`, its operations out of a selective checkpoint's sight. `codec` itself goes into the recipe."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        with unseen():
            return self.codec.encode(x)

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:
        with unseen():
            return self.codec.encode_normalized(x, mean, rstd)


class PlaceholderCodec:
    """`codec`, with tensors of the right shapes for codes. `codec` itself goes into the recipe."""

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
    """In place of `bitmask.encode(mask)`."""
    with unseen():
        return _like(mask, ((mask.numel() + 7) // 8,), torch.uint8)


def discards(pack: Any) -> bool:
    """Whether a pack hook is that of a non-reentrant checkpoint's first pass."""
    return _is_checkpoints(pack, "_checkpoint_hook.")


def _is_checkpoints(pack: Any, owner: str) -> bool:
    return (
        pack is not None
        and getattr(pack, "__module__", None) == "torch.utils.checkpoint"
        and pack.__qualname__.startswith(owner)
    )


def recomputes(pack: Any) -> bool:
    """Whether a pack hook is that of a non-reentrant checkpoint's recompute."""
    return _is_checkpoints(pack, "_recomputation_hook.")


def selective() -> bool:
    """Whether a selective checkpoint is watching, in either of its passes."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any([isinstance(m, _SELECTIVE) for m in _get_current_dispatch_mode_stack()])


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Take selective checkpoints' modes off; others stay on."""
    if not selective():
        yield
        return
    # PyTorch's own modes (fake tensors, tracing) lie below those of users, and are told by a key.
    stack = [m for m in _get_current_dispatch_mode_stack() if getattr(m, "_mode_key", None) is None]
    others = [m for m in stack if not isinstance(m, _SELECTIVE)]
    _exchange(len(stack), others)
    try:
        yield
    finally:
        _exchange(len(others), stack)


def _exchange(count: int, modes: list[Any]) -> None:
    for _ in range(count):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device=x.device).expand(shape)
