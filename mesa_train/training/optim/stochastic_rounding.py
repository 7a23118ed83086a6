"""Rounding to bfloat16 so that small updates are not lost: up or down at random, right on average.

bfloat16 keeps 8 bits of a weight; to nearest, an update below 2^-9 of it changes nothing, and a
whole run of such updates is lost. Rounded stochastically, the expected weight moves by exactly the
update. No second copy of the weights is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_bfloat16(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 to bfloat16, each element to one of its two neighbours, the nearer one more often, so
    that the expectation is `value`. Infinities and NaNs stay, and exact values do too."""
    if value.dtype is not torch.float32:
        raise TypeError(f"round_to_bfloat16 takes float32, got {value.dtype}")
    # The lower 16 bits of a float32 are what bfloat16 drops: add a random 16-bit number and cut.
    noise = torch.randint(
        0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def write_rounded(weight: Tensor, value: Tensor, generator: torch.Generator | None = None) -> None:
    """Write a float32 value to a weight in place, stochastically if the weight is bfloat16."""
    if weight.dtype is torch.bfloat16:
        value = round_to_bfloat16(value, generator)
    weight.copy_(value)
