"""Every body of the operators under one name, and inputs that visit the corners."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor

from mesa_train import kernels
from mesa_train.kernels import reference

# Seconds until a process that does not end is given up. Far more than any takes: a machine under heavy
# load is ten times slower, and a compiler was not through after 300 there.
PATIENCE_S = 3600

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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """One thread, unless the test asks for more: tensors are small and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _has_native() -> bool:
    kernels.load()
    return torch._C._dispatch_has_kernel_for_dispatch_key("mesa_train::affine_encode", "CPU")


@pytest.fixture(scope="session")
def native() -> SimpleNamespace:
    """The C++ kernels."""
    if not _has_native():
        pytest.skip("no C++ kernels here: no compiler, or MESA_TRAIN_CPU_KERNELS=0")
    return SimpleNamespace(**{n: getattr(torch.ops.mesa_train, n).default for n in OPERATORS})


@pytest.fixture
def triton() -> Iterator[SimpleNamespace]:
    """The Triton kernels: on the GPU where there is one, else interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    # Numpy, which the interpreter computes with, warns of overflow and NaN.
    with np.errstate(all="ignore"):
        yield triton_interpreter.bodies()


@pytest.fixture(params=["reference", "native", "triton"])
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The reference's bodies, then the C++ kernels, then the Triton kernels."""
    if request.param != "reference":
        return request.getfixturevalue(request.param)
    return SimpleNamespace(**{name: getattr(reference, name) for name in OPERATORS})


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
