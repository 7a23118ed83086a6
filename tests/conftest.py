"""What every test shares: a fixed number of threads, seeds, and the device that is tested."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from seeding import seed_torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="device the tests run on: cpu (default) or cuda"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A compiler for DeepSpeed's extensions. mesa_train and inductor compile with g++.
    if shutil.which("c++") and shutil.which("g++"):
        os.environ["PATH"] = f"{Path(__file__).parent / 'compiler'}{os.pathsep}{os.environ['PATH']}"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no CUDA device here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with slow tests begin first, so that no process is left with one of them at the end.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not a keyword: a folder may be called gpu
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_torch(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Forget Accelerate's state of the process after each test: the next test's precision may differ."""
    yield
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None:
        for name in ("AcceleratorState", "GradientState", "PartialState"):
            getattr(accelerate, name)._reset_state()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; `--device cuda` moves every test that asks for it."""
    return torch.device(request.config.getoption("--device"))
