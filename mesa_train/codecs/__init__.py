"""Codecs: how the elements of a stash are stored."""

from __future__ import annotations

from typing import Any

from .affine import Affine
from .lossless import Lossless


def of(bits: int, group_size: int, stochastic: bool, running: bool) -> Any:
    """The codec with these parameters; None for running ranges, which belong to a module and an
    operand."""
    if running:
        return None
    return Lossless() if bits == 32 else Affine(bits, group_size, stochastic, 0)
