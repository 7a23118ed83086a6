"""Codecs: how the elements of a stash are stored."""

from __future__ import annotations

from typing import Any

from .affine import Affine
from .lossless import Lossless


def of(bits: int, group_size: int, rounding: str, running: bool) -> Any:
    """The codec with these parameters.

    Args:
        bits: 8, 6, 5, 4, 3 or 2; 32 for lossless.
        group_size: elements that share one scale.
        rounding: "nearest", "stochastic" or "dither".
        running: running ranges instead of exact ranges.
    Returns:
        The codec, or None for running ranges. Running ranges belong to a module and an operand.
    """
    if running:
        return None
    if bits == 32:
        return Lossless()
    return Affine(bits, group_size, rounding != "nearest", dither=rounding == "dither")
