"""Compiles cpu.cpp once a machine and loads it: the C++ kernels then stand in for the reference.

The library is kept in a cache directory under a name that holds everything it depends on: source,
flags, compiler, torch and the processor. Several processes may start at once: one compiles while
the others wait for its lock, and where the file system has no locks each compiles for itself and
the last to finish replaces an equal file.

Environment:
    MESA_TRAIN_CACHE          the cache directory; ~/.cache/mesa_train if unset
    MESA_TRAIN_CPU_KERNELS=0  use the plain-torch reference
    MESA_TRAIN_CXXFLAGS       more flags for the compiler, such as -march=x86-64-v3
    CXX                       the compiler; g++, c++ or clang++, the first found, if unset
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_SOURCES = (
    Path(__file__).parent / "cpu.cpp",
    *sorted(Path(__file__).parent.glob("cpu_*.h")),
)
# Contraction into FMA would round once where the specification rounds twice. Without errno and
# floating-point traps, which nobody reads, more loops vectorise.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_TIMEOUT_S = 300

logger = logging.getLogger(__name__)


class _BuildError(Exception):
    """Why there is no native library, in words for the log."""


def load() -> bool:
    """Load the C++ kernels, compiling them if need be. False, after one warning, if that fails."""
    if os.environ.get("MESA_TRAIN_CPU_KERNELS", "1") == "0":
        return False
    try:
        torch.ops.load_library(str(_library()))
    except (_BuildError, OSError, RuntimeError) as error:
        logger.warning(
            "mesa_train runs without its C++ kernels: the plain-torch reference gives the same "
            "results about ten times slower. To fix it, install a C++20 compiler (g++ 11 or later) "
            "or name one in CXX, and name a writable directory in MESA_TRAIN_CACHE if that is what "
            "is missing; to silence this, set MESA_TRAIN_CPU_KERNELS=0. The reason: %s",
            error,
        )
        return False
    return True


def _cache() -> Path:
    return Path(os.environ.get("MESA_TRAIN_CACHE") or "~/.cache/mesa_train").expanduser()


def _compiler() -> list[str]:
    """The compiler and its leading arguments, such as ["ccache", "g++"]."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise _BuildError("no C++ compiler found (looked for g++, c++ and clang++)")


def _flags() -> list[str]:
    """The compiler's flags; of contradictory ones it takes the last."""
    return [*_FLAGS, *shlex.split(os.environ.get("MESA_TRAIN_CXXFLAGS", ""))]


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _library() -> Path:
    """The path of the compiled library."""
    compiler = _compiler()
    parts = [*compiler, *_flags(), torch.__version__, _processor()]
    parts += [source.read_text() for source in _SOURCES]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = _cache() / f"cpu_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _compile(compiler, path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, where there are locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], path: Path) -> None:
    """Compile beside `path`, then rename: whoever looks sees all of the library or nothing."""
    root = Path(torch.__file__).parent
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so.tmp")
    os.close(handle)
    command = [*compiler, *_flags(), str(_SOURCES[0]), "-o", name]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    command += [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            raise _BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        Path(name).replace(path)
    except subprocess.TimeoutExpired as error:
        raise _BuildError(f"{shlex.join(command)} took more than {_TIMEOUT_S} s") from error
    finally:
        Path(name).unlink(missing_ok=True)
