"""The build of the C++ kernels: compiles them once per machine, and loads them.

The kernels replace the reference on the CPU.

Several sources compile at once. In total they take 44 s on Zen 3, and the longest part takes 13 s.
A compiler takes up to 520 MB, so the number of compilers is limited by the free memory.

The library is stored in a cache directory. Its name is a hash of all that it depends on: sources,
flags, compiler, torch and the processor. If several processes start at once, one compiles and the
others wait for its lock. If the file system has no locks, each process compiles, and the last
process to finish replaces an equal file. Until then all files are written to a separate directory.
So a build that fails or is interrupted leaves no library.

If the compiler does not know this processor, the kernels are built for an older one.

Environment:
    MESA_TRAIN_CACHE          the cache directory; default: ~/.cache/mesa_train
    MESA_TRAIN_CPU_KERNELS=0  use the plain-torch reference
    MESA_TRAIN_CXXFLAGS       more flags for the compiler, such as -march=x86-64-v3
    MAX_JOBS                  the largest number of compilers at once, as for torch's own extensions
    CXX                       the compiler; default: the first found of g++, c++ and clang++
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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_HERE = Path(__file__).parent
# The compilation units: a source and its definitions, the longest first. Fewer units would be less
# work in total, because each unit reads torch's headers again.
_UNITS = (
    (_HERE / "decode.cpp", ()),
    (_HERE / "encode.cpp", ()),
    (_HERE / "passes.cpp", ("-DMESA_DTYPE=BFloat16",)),
    (_HERE / "passes.cpp", ("-DMESA_DTYPE=Float16",)),
    (_HERE / "passes.cpp", ("-DMESA_DTYPE=Float32",)),
)
_SOURCES = (*sorted(_HERE.glob("*.cpp")), *sorted(_HERE.glob("*.h")))
# Contraction into FMA would round once, but the specification rounds twice. Without errno and
# floating-point traps, which mesa_train does not read, more loops vectorise.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
# A compiler takes 5 to 10 s. The limit stops a compiler that hangs, and is large enough for a
# machine under heavy load.
_TIMEOUT_S = 3600
_COMPILER_BYTES = 640 << 20

logger = logging.getLogger(__name__)


class _BuildError(Exception):
    """The reason why there is no native library, as text for the log."""


def load() -> bool:
    """Load the C++ kernels, and compile them if needed.

    Returns:
        True if the kernels are loaded. False, after one warning, if that fails or the user has
        disabled them.
    """
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
    """The cache directory."""
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
    """The compiler's flags. If two flags contradict, the compiler uses the last."""
    return [*_FLAGS, *shlex.split(os.environ.get("MESA_TRAIN_CXXFLAGS", ""))]


def _processor() -> str:
    """The properties that -march=native depends on. Different machines may share a cache."""
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
        with _locked(path.with_suffix(".lock")) as alone:
            if not path.exists():
                if alone:
                    # Files that a killed process has left.
                    for rest in path.parent.glob(f"{path.stem}.*.tmp"):
                        shutil.rmtree(rest, ignore_errors=True)
                _build(compiler, path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Context manager: hold a lock between processes. Yields False if there are no locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _build(compiler: list[str], path: Path) -> None:
    """Compile for this processor. If the compiler cannot, compile for an older processor."""
    try:
        _compile(compiler, _flags(), path)
    except _BuildError as first:
        older = _older_flags()
        if older == _flags():
            raise
        logger.info("mesa_train: building for an older processor, since %s", first)
        try:
            _compile(compiler, older, path)
        except _BuildError:
            raise first from None


def _older_flags() -> list[str]:
    """The flags for any processor with the instructions that torch found in this processor."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    march = ["-march=x86-64-v3"] if wide else []
    return [flag for old in _flags() for flag in (march if old == "-march=native" else [old])]


def _compile(compiler: list[str], flags: list[str], path: Path) -> None:
    """Compile and link beside `path`, then rename.

    So another process sees the complete library or none.
    """
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    aside = Path(tempfile.mkdtemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent))
    try:
        objects, commands = [], []
        for number, (source, definitions) in enumerate(_UNITS):
            objects.append(str(aside / f"{number}.o"))
            commands.append(
                [*compiler, *flags, *include, *definitions, "-c", str(source), "-o", objects[-1]]
            )
        _run(commands)
        library = str(aside / path.name)
        _run([[*compiler, *flags, "-shared", *objects, "-o", library, *libraries]])
        Path(library).replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _run(commands: list[list[str]]) -> None:
    """Run commands, several at once. After the first failure, no further command starts."""
    deadline = time.monotonic() + _TIMEOUT_S
    with ThreadPoolExecutor(_jobs(len(commands))) as pool:
        try:
            for _ in pool.map(lambda command: _run_one(command, deadline), commands):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_one(command: list[str], deadline: float) -> None:
    """Run one command. _BuildError if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired as error:
        raise _BuildError(f"{shlex.join(command)} took more than {_TIMEOUT_S} s") from error
    if done.returncode:
        raise _BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")


def _jobs(most: int) -> int:
    """The number of compilers at once.

    At most one per core, and only as many as fit into memory.
    """
    if chosen := os.environ.get("MAX_JOBS"):
        return max(1, int(chosen)) if chosen.isdecimal() else 1
    try:
        cores = len(os.sched_getaffinity(0))
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (AttributeError, OSError, StopIteration):
        return max(1, min(most, os.cpu_count() or 1))
    return max(1, min(most, cores, free // _COMPILER_BYTES))
