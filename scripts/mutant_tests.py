"""Runs tests on a copy of the repository, in forked children, for `mutate.py`.

A first run notes which lines of the package each test executes, and for how long. A mutant is then met by the
tests that execute its statement alone, the shortest first, so most mutants die within a second. This process
imports torch and other libraries once, never mesa_train, and every child checks that it imports the copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
_COPIED = ("mesa_train", "tests", "pyproject.toml", "recipes", "scripts", "README.md", "docs")
# Imported before the forks; those that are absent are left to the tests to miss.
_LIBRARIES = (
    *(
        "torch",
        "torch.utils.checkpoint",
        "torch.utils.flop_counter",
        "torch._subclasses.fake_tensor",
    ),
    *("torch.testing._internal.common_methods_invocations", "torch.nn.utils.parametrize"),
    *("numpy", "timm", "torchvision", "scipy.optimize", "yaml", "rich.console", "typer.testing"),
    *("hypothesis", "PIL.Image", "sklearn.datasets", "pytest", "_pytest.assertion.rewrite"),
)
_MEMORY = 20 * 2**30  # of a child, where a changed number would take all of it
_OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu")
# Of libraries that were imported before pytest began.
_QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


@dataclasses.dataclass
class Test:
    """seconds: of its run while its lines were noted. lines: by file, below the package."""

    name: str
    seconds: float
    lines: dict[str, set[int]]


def copy_to(folder: Path) -> None:
    """The repository without caches, into an empty folder; and the libraries into this process."""
    assert "mesa_train" not in sys.modules
    for library in _LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def noted(copy: Path, files: Sequence[str], cache: Path) -> list[Test]:
    """The tests that pass in these files, with the lines that they execute; from `cache` if it is
    there."""
    if not cache.exists():
        report = copy / "noted.json"
        report.unlink(missing_ok=True)
        _wait(_child(copy, lambda: _note(copy, files, report)), 3600)
        if not report.exists():
            raise SystemExit(f"{' '.join(files)} cannot be run: {(copy / 'log.txt').read_text()}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(report, cache)
    rows = json.loads(cache.read_text())
    for row in rows:
        if not row["passed"]:
            print(f"left out: {row['name']} fails without a mutant", flush=True)
    return [
        Test(row["name"], row["seconds"], {f: set(n) for f, n in row["lines"].items()})
        for row in rows
        if row["passed"]
    ]


def first_failure(
    copy: Path, changed: Path, tests: Sequence[Test], limit_s: float
) -> tuple[str | None, float]:
    """(the first of `tests` that fails, None if all pass; seconds), with one file changed."""
    for cached in changed.parent.glob(f"__pycache__/{changed.stem}.*"):
        cached.unlink()
    report = copy / "outcome.json"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    names = [test.name for test in tests]
    status = _wait(_child(copy, lambda: _fail(names, report)), limit_s)
    taken = time.monotonic() - begun
    if status is None:
        return f"its time: over {limit_s:.0f} s", taken
    if not report.exists():
        return f"the process: status {status}", taken
    return json.loads(report.read_text())["by"], taken


def _child(copy: Path, work: Any) -> int:
    """Fork; the child imports the copy, does `work` and ends. Its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with (copy / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    own = {str(REPOSITORY), str(REPOSITORY / "scripts"), ""}
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in own)]
    os.environ["PYTHONPATH"] = str(copy)
    try:
        work()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)


def _wait(child: int, limit_s: float) -> int | None:
    """The status of a child, None if it took too long; whatever it started is ended."""
    end, status = time.monotonic() + limit_s, None
    while status is None and time.monotonic() < end:
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _import(copy: Path) -> None:
    import mesa_train

    assert mesa_train.__file__ is not None
    assert Path(mesa_train.__file__).resolve().is_relative_to(copy.resolve())


class _Noting:
    """A plugin of pytest: the outcome, seconds and executed lines of each test."""

    def __init__(self, package: str) -> None:
        self.package, self.seen = package, set[tuple[str, int]]()
        self.shared: dict[str, set[tuple[str, int]]] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_protocol(self) -> None:
        self.seen.clear()
        sys.settrace(self.entered)

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.rows.setdefault(
            report.nodeid, {"name": report.nodeid, "seconds": 0.0, "passed": True}
        )
        row["seconds"] += report.duration
        row["passed"] &= report.passed
        shared = self.shared.setdefault(report.nodeid.partition("::")[0], set())
        if report.when == "setup":
            shared |= self.seen
        if report.when == "teardown":
            sys.settrace(None)
            row["own"] = set(self.seen)

    def finished(self) -> list[dict[str, Any]]:
        """The rows. A fixture of a whole file serves all its tests, so what setting up executes counts
        for all of them."""
        for name, row in self.rows.items():
            lines: dict[str, list[int]] = {}
            every = row.pop("own", set()) | self.shared[name.partition("::")[0]]
            for file, line in sorted(every):
                lines.setdefault(file[len(self.package) :], []).append(line)
            row["lines"] = lines
        return list(self.rows.values())

    def entered(self, frame: FrameType, *_: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(self.package):
            return None
        add = self.seen.add
        add((file, frame.f_lineno))

        def traced(frame: FrameType, *_: Any) -> Any:
            add((file, frame.f_lineno))
            return traced

        return traced


def _note(copy: Path, files: Sequence[str], report: Path) -> None:
    import pytest

    _import(copy)
    noting = _Noting(f"{copy / 'mesa_train'}/")
    pytest.main([*_OPTIONS, *_QUIET, *files], plugins=[noting])
    report.write_text(json.dumps(noting.finished()))


class _First:
    """A plugin of pytest: runs given tests in given order, and remembers what fails first."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: number for number, name in enumerate(names)}
        self.by: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order),
            key=lambda item: self.order[item.nodeid],
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.by is None:
            self.by = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.by is None:
            self.by = f"{report.nodeid} (collected)"


def _fail(names: Sequence[str], report: Path) -> None:
    sys.dont_write_bytecode = True
    try:
        _import(Path.cwd())
    except BaseException as error:
        report.write_text(json.dumps({"by": f"import: {type(error).__name__}"}))
        return
    import pytest

    first = _First(names)
    files = dict.fromkeys(name.partition("::")[0] for name in names)
    code = int(pytest.main(["-x", *_OPTIONS, *_QUIET, *files], plugins=[first]))
    by = first.by or (f"pytest: exit {code}" if code else None)
    report.write_text(json.dumps({"by": by}))


@contextlib.contextmanager
def changed(path: Path, source: str) -> Iterator[None]:
    """A context in which a file has another text."""
    before = path.read_text()
    path.write_text(source)
    try:
        yield
    finally:
        path.write_text(before)
