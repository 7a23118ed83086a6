"""Compile C++ sources once per machine, and cache the library.

The library is stored in a cache directory. Its name is a hash of all that it depends on: sources,
flags, compiler, torch, Python and the processor. If several processes start at once, one compiles
and the others wait for its lock. If the file system has no locks, each process compiles, and the
last process to finish replaces an equal file. Until then all files are written to a separate
directory. So a build that fails or is interrupted leaves no library.

Several sources compile at once. A compiler takes up to 1.1 GB, so the number of compilers is limited
by the free memory. If the compiler does not know this processor, the library is built for an older
one.

Environment:
    MESA_TRAIN_CACHE          the cache directory; default: ~/.cache/mesa_train
    MESA_TRAIN_CXXFLAGS       more flags for the compiler, such as -march=x86-64-v3
    MAX_JOBS                  the largest number of compilers at once, as for torch's own extensions
    CXX                       the compiler; default: the first found of g++, c++ and clang++
"""

import contextlib
import dataclasses
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

# Contraction into FMA would round once, but the specification rounds twice. Without errno and
# floating-point traps, which mesa_train does not read, more loops vectorise.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
# A compiler takes 5 to 40 s. The limit stops a compiler that hangs, and is large enough for a
# machine under heavy load.
_TIMEOUT_S = 3600

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """The reason why there is no library, as text for the log."""


# A compilation unit: a source, and the compiler's definitions for it.
Unit = tuple[Path, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Library:
    """A library that is compiled at its first use.

    Args:
        name: the first part of the file's name.
        units: the compilation units, the longest first.
        sources: all files that the units read.
        compiler_bytes: memory that one compiler takes.
        includes: folders of more headers; default: torch's alone.
        libraries: libraries of torch to link with.
    """

    name: str
    units: tuple[Unit, ...]
    sources: tuple[Path, ...]
    compiler_bytes: int
    includes: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ("torch", "torch_cpu", "c10")

    def path(self) -> Path:
        """The path of the library. Compiles it if it does not exist.

        Raises:
            BuildError: there is no compiler, or it fails.
            OSError: the cache directory cannot be written to.
        """
        compiler = _compiler()
        parts = [*compiler, *_flags(), torch.__version__, *self.includes, _processor()]
        parts += [source.read_text() for source in self.sources]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        path = _cache() / f"{self.name}_{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")) as alone:
                if not path.exists():
                    if alone:
                        # Files that a killed process has left.
                        for rest in path.parent.glob(f"{path.stem}.*.tmp"):
                            shutil.rmtree(rest, ignore_errors=True)
                    self._build(compiler, path)
        return path

    def _build(self, compiler: list[str], path: Path) -> None:
        """Compile for this processor. If the compiler cannot, compile for an older processor."""
        try:
            self._compile(compiler, _flags(), path)
        except BuildError as first:
            older = _older_flags()
            if older == _flags():
                raise
            logger.info("mesa_train: building for an older processor, since %s", first)
            try:
                self._compile(compiler, older, path)
            except BuildError:
                raise first from None

    def _compile(self, compiler: list[str], flags: list[str], path: Path) -> None:
        """Compile and link beside `path`, then rename.

        So another process sees the complete library or none.
        """
        root = Path(torch.__file__).parent
        folders = [root / "include", root / "include/torch/csrc/api/include", *self.includes]
        include = [f"-I{folder}" for folder in folders]
        libraries = [f"-L{root / 'lib'}", *(f"-l{name}" for name in self.libraries)]
        aside = Path(tempfile.mkdtemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent))
        try:
            objects, commands = [], []
            for number, (source, definitions) in enumerate(self.units):
                objects.append(str(aside / f"{number}.o"))
                named = ["-c", str(source), "-o", objects[-1]]
                commands.append([*compiler, *flags, *include, *definitions, *named])
            _run(commands, jobs(len(commands), self.compiler_bytes))
            library = str(aside / path.name)
            _run([[*compiler, *flags, "-shared", *objects, "-o", library, *libraries]], 1)
            Path(library).replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


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
    raise BuildError("no C++ compiler found (looked for g++, c++ and clang++)")


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


def _older_flags() -> list[str]:
    """The flags for any processor with the instructions that torch found in this processor."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    march = ["-march=x86-64-v3"] if wide else []
    return [flag for old in _flags() for flag in (march if old == "-march=native" else [old])]


def _run(commands: list[list[str]], jobs: int) -> None:
    """Run commands, `jobs` at once. After the first failure, no further command starts."""
    deadline = time.monotonic() + _TIMEOUT_S
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in pool.map(lambda command: _run_one(command, deadline), commands):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_one(command: list[str], deadline: float) -> None:
    """Run one command. BuildError if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command)} took more than {_TIMEOUT_S} s") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")


def jobs(most: int, compiler_bytes: int) -> int:
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
    return max(1, min(most, cores, free // compiler_bytes))
