"""Building and loading the C++ kernels: in processes of their own, since a library loads once."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
from limits import HUNG_S

from mesa_train import kernels

ENCODE = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from mesa_train import kernels
from mesa_train.codecs.affine import Affine
torch.manual_seed(0)
x = torch.randn(9, 130)
for _ in range(3):
    codes, scales = Affine(4, 64, True, 1).encode(x)
native = torch._C._dispatch_has_kernel_for_dispatch_key("mesa_train::affine_encode", "CPU")
print(native, codes.long().sum().item(), scales.float().sum().item())
"""

has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")


def start(script, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=HUNG_S)
    assert process.returncode == 0, err
    native, *result = out.split()
    return native == "True", result, err


@pytest.fixture(scope="module")
def expected():
    native, result, err = finish(start(ENCODE, MESA_TRAIN_CPU_KERNELS="0"))
    assert not native
    assert not err, "asked for: nothing to warn of"
    return result


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_broken_compiler_gives_one_warning_and_right_results(tmp_path, expected, compiler):
    native, result, err = finish(start(ENCODE, CXX=compiler, MESA_TRAIN_CACHE=str(tmp_path)))
    assert not native
    assert result == expected
    assert err.count("runs without its C++ kernels") == 1
    assert "install a C++20 compiler" in err
    assert not list(tmp_path.glob("*.tmp"))


def test_an_unusable_cache_gives_one_warning(tmp_path, expected):
    file = tmp_path / "file"
    file.touch()
    native, result, err = finish(start(ENCODE, MESA_TRAIN_CACHE=str(file / "below")))
    assert not native
    assert result == expected
    assert err.count("runs without its C++ kernels") == 1


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_share_one_build(tmp_path, expected):
    both = [start(ENCODE, MESA_TRAIN_CACHE=str(tmp_path / "new"), MESA_TRAIN_CPU_KERNELS="1")]
    both += [start(ENCODE, MESA_TRAIN_CACHE=str(tmp_path / "new"), MESA_TRAIN_CPU_KERNELS="1")]
    for process in both:
        native, result, err = finish(process)
        assert native, err
        assert result == expected
    assert len(list((tmp_path / "new").glob("*.so"))) == 1
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_import_compiles_nothing():
    script = """
import sys, torch
before = set(sys.modules)
import mesa_train.kernels
new = set(sys.modules) - before
assert "mesa_train.kernels.cpu_build" not in new
assert not any(name.startswith(("torch._dynamo", "torch._inductor", "triton")) for name in new)
print(torch._C._dispatch_has_kernel_for_dispatch_key("mesa_train::affine_encode", "CPU"))
"""
    native, _, _ = finish(start(script))
    assert not native


def test_load_from_many_threads(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", False)
    calls = []
    from mesa_train.kernels import cpu_build

    monkeypatch.setattr(cpu_build, "load", lambda: calls.append(1))
    threads = [threading.Thread(target=kernels.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
