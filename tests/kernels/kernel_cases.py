"""The operators that every backend has, and inputs of every magnitude."""

from collections.abc import Callable

import torch
from torch import Tensor

OPERATORS = (
    "affine_encode",
    "affine_encode_parts",
    "affine_decode",
    "normalized_encode",
    "norm_backward",
    "activation_decode",
    "activation_backward",
    "activation_pair",
    "softmax_backward",
    "scale_backward",
    "bitmask_encode",
    "bitmask_positive",
    "bitmask_apply",
)


def special(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of every magnitude from denormal to huge, and rows of zeros, constants, NaN and inf."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-45, 39, (rows, 1), generator=generator)
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * 10.0**exponent
    fills: list[Callable[[Tensor], object]] = [
        lambda row: row[:1].fill_(float("nan")),
        lambda row: row[-1:].fill_(float("inf")),
        lambda row: row[cols // 2 :][:1].fill_(float("-inf")),
        lambda row: row.fill_(3.1),
        lambda row: row.fill_(-0.0),
        lambda row: row.fill_(-0.0)[::2].fill_(0.0),
        lambda row: row.fill_(3.4e38)[::2].fill_(-3.4e38),
        lambda row: row.fill_(torch.finfo(torch.float32).min)[::3].fill_(1.0),
        lambda row: row.fill_(torch.finfo(torch.float32).max),
        lambda row: row.fill_(1e-45)[::2].fill_(-1e-45),
    ]
    for row, fill in zip(x, fills, strict=False):
        fill(row)
    return x.to(dtype)
