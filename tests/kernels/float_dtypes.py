"""The dtypes that operators are tested in. float16 and float64 run in the whole suite alone."""

import pytest
import torch

FLOATS = [
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    pytest.param(torch.float64, marks=pytest.mark.slow),
]
BITS = [8, 5, 4, *(pytest.param(b, marks=pytest.mark.slow) for b in (6, 3, 2))]
