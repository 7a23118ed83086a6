"""Codecs: how the elements of a stash are stored."""

from __future__ import annotations

from typing import Any

from .affine import Affine
from .lossless import Lossless


def of(bits: int, group_size: int, stochastic: bool, running: bool) -> Any:
    """The codec with these parameters.

    Args:
        bits: 8, 4 or 2; 32 for lossless.
        group_size: elements that share one scale.
        stochastic: stochastic rounding instead of nearest.
        running: running ranges instead of exact ranges.
    Returns:
        The codec, or None for running ranges. Running ranges belong to a module and an operand.
    """
    if running:
        return None
    return Lossless() if bits == 32 else Affine(bits, group_size, stochastic, 0)
