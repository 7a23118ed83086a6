"""Bytes of an optimizer's states, by arithmetic: AdamW's two moments, whole or in 8 bits."""

from __future__ import annotations

# bitsandbytes keeps tensors below this many elements in 32 bits, and a float32 range for every
# block of this many elements of the others.
LEAST_8BIT, _BLOCK = 4096, 256
# The step count of torch's AdamW, a float32 scalar a parameter.
_STEP = 4


def adamw_bytes(elements: int, itemsize: int, eight_bit: bool = False) -> int:
    """Bytes of AdamW's states of one parameter.

    elements, itemsize: of the parameter; torch keeps its moments in the same dtype. eight_bit:
    bitsandbytes' AdamW8bit, whose small tensors have float32 moments.
    """
    if not eight_bit:
        return 2 * elements * itemsize + _STEP
    if elements < LEAST_8BIT:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // _BLOCK))
