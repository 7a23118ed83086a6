"""Every body of the operators under one name."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton_interpreter
from kernel_cases import OPERATORS
from seeding import seed_torch

from mesa_train import kernels
from mesa_train.kernels import reference


@pytest.fixture(autouse=True)
def seed() -> None:
    seed_torch(0)


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
