"""Building and loading the C++ kernels: in processes of their own, since a library loads once."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
from limits import HUNG_S

from mesa_train import kernels
from mesa_train.kernels.cpu import build as cpu_build
from mesa_train.utils import cpp_build

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


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_broken_compiler_gives_one_warning_and_right_results(tmp_path, expected, compiler):
    native, result, err = finish(start(ENCODE, CXX=compiler, MESA_TRAIN_CACHE=str(tmp_path)))
    assert not native
    assert result == expected
    assert err.count("runs without its C++ kernels") == 1
    assert "install a C++20 compiler" in err
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
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
    environment = {
        "MESA_TRAIN_CACHE": str(tmp_path / "new"),
        "MESA_TRAIN_CPU_KERNELS": "1",
        # Which flags makes no difference here, and these compile in a third of the time.
        "MESA_TRAIN_CXXFLAGS": "-O0",
    }
    for process in [start(ENCODE, **environment) for _ in range(2)]:
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
assert "mesa_train.kernels.cpu.build" not in new
assert not any(name.startswith(("torch._dynamo", "torch._inductor", "triton")) for name in new)
print(torch._C._dispatch_has_kernel_for_dispatch_key("mesa_train::affine_encode", "CPU"))
"""
    native, _, _ = finish(start(script))
    assert not native


def test_import_starts_no_backward():
    """A backward starts threads where there is a GPU, and a process that was forked then has no autograd."""
    script = """
import torch

def refuse(*_, **__):
    raise AssertionError("a backward at import")

torch.autograd.graph._engine_run_backward = refuse
torch.autograd._engine_run_backward = refuse
import mesa_train
print("imported")
"""
    finish(start(script))


def test_load_from_many_threads(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", False)
    calls = []
    monkeypatch.setattr(cpu_build, "load", lambda: calls.append(1))
    threads = [threading.Thread(target=kernels.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


# In the place of a compiler: writes its arguments to a file beside it, and an output unless one of them
# is what it was told to refuse.
COMPILER = """
printf '%s\\n' "$*" >> "$0.log"
for argument; do
  case "$argument" in
    {refused}) echo "refused: $argument" >&2; exit 1;;
  esac
  [ "$previous" = -o ] && echo done > "$argument"
  previous=$argument
done
exit 0
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(refused) puts such a compiler in CXX; returns what it was called with."""

    def set_up(refused):
        script = tmp_path / "compiler.sh"
        script.write_text(COMPILER.format(refused=refused))
        monkeypatch.setenv("CXX", f"sh {script}")
        return lambda: script.with_suffix(".sh.log").read_text().splitlines()

    monkeypatch.setenv("MESA_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MESA_TRAIN_CXXFLAGS", raising=False)
    return set_up


def test_one_object_that_does_not_compile_leaves_nothing(tmp_path, compiler):
    compiler("-DMESA_DTYPE=Float16")
    with pytest.raises(cpp_build.BuildError, match="refused: -DMESA_DTYPE=Float16"):
        cpu_build.LIBRARY.path()
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_compiler_that_does_not_know_this_processor_builds_for_an_older_one(tmp_path, compiler):
    called = compiler("-march=native")
    path = cpu_build.LIBRARY.path()
    assert path.read_text() == "done\n"
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".tmp"] == []
    # The last calls are those of the second build: every object, and the link.
    built = called()[-len(cpu_build.LIBRARY.units) - 1 :]
    assert not any("-march=native" in line for line in built)
    assert sum(" -c " in line for line in built) == len(cpu_build.LIBRARY.units)
    before = len(called())
    assert cpu_build.LIBRARY.path() == path
    assert len(called()) == before, "it is there already"


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path, compiler):
    compiler("nothing")
    path = cpu_build.LIBRARY.path()
    path.unlink()
    (path.parent / f"{path.stem}.abc.tmp").mkdir()
    (path.parent / f"{path.stem}.abc.tmp" / "0.o").write_text("half")
    other = path.parent / "cpu_of_another_build.abc.tmp"
    other.mkdir()
    assert cpu_build.LIBRARY.path().exists()
    assert [p for p in path.parent.iterdir() if p.suffix == ".tmp"] == [other]


@pytest.mark.parametrize(("chosen", "jobs"), [("1", 1), ("3", 3), ("0", 1), ("many", 1)])
def test_max_jobs_limits_the_compilers(monkeypatch, chosen, jobs):
    monkeypatch.setenv("MAX_JOBS", chosen)
    assert cpp_build.jobs(5, 1 << 20) == jobs


def test_no_more_compilers_than_cores_or_objects(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert cpp_build.jobs(1, 1 << 20) == 1
    assert 1 <= cpp_build.jobs(1000, 1 << 20) <= (os.cpu_count() or 1)
