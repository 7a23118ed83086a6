"""Test runs on a copy of the repository, in forked children, for `mutate.py`.

A first run records which tests execute the statements of the drawn mutants. It inserts a call
before each of these statements (`sys.settrace` makes tests five times slower). Only those tests
then run against a mutant, the shortest first, so most mutants die within a second.

This process imports torch and other libraries once, never mesa_train. Every child checks that it
imports the copy.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_COPIED = (
    *("mesa_train", "tests", "pyproject.toml", "recipes", "scripts", "README.md", "docs"),
    *("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "mkdocs.yml"),
)
# Imported before the forks. If a library is missing, the tests report it.
_LIBRARIES = (
    *(
        "torch",
        "torch.utils.checkpoint",
        "torch.utils.flop_counter",
        "torch._subclasses.fake_tensor",
    ),
    *("torch.testing._internal.common_methods_invocations", "torch.nn.utils.parametrize"),
    *("numpy", "timm", "torchvision", "highspy", "yaml", "rich.console", "typer.testing"),
    *("hypothesis", "PIL.Image", "sklearn.datasets", "pytest", "_pytest.assertion.rewrite"),
)
_MEMORY = 20 * 2**30  # limit of a child, because a mutant may allocate all memory
_OF_A_FILE = 1000  # largest number of tests of a file; drawn at random from more
_OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu")
# Silences a warning about libraries imported before pytest starts.
_QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


_WATCH = "mesa_train_watch"  # name of a module in the copy
_WATCHING = """SEEN = set()


def seen(number):
    SEEN.add(number)


# torch.compile calls it while it compiles, and compiles the rest as if it were not there.
seen._dynamo_marked_constant = True
"""


@dataclasses.dataclass
class Test:
    """A test.

    Attributes:
        name: pytest's node id.
        seconds: processor time.
        marks: numbers of the marks that it executes.
    """

    name: str
    seconds: float
    marks: set[int]

    @property
    def file(self) -> str:
        """Its file, relative to the repository's root."""
        return self.name.partition("::")[0]


def copy_to(folder: Path) -> None:
    """Copy the repository without caches into an empty folder, and import the libraries."""
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
    (folder / f"{_WATCH}.py").write_text(_WATCHING)


def passing_tests(copy: Path, files: Sequence[str], marks: Sequence[tuple[str, int]]) -> list[Test]:
    """The tests in `files` that pass.

    Args:
        copy: the copied repository.
        files: test files.
        marks: (file relative to the package, line of a statement) for each mark.
    """
    report = copy / "noted.json"
    report.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        for file in {file for file, _ in marks}:
            lines = {line: number for number, (f, line) in enumerate(marks) if f == file}
            path = copy / "mesa_train" / file
            stack.enter_context(changed(path, insert_marks(path.read_text(), lines)))
        _wait(_child(copy, lambda: _note(copy, files, report)), 3600)
    if not report.exists():
        raise SystemExit(f"{' '.join(files)} cannot be run: {(copy / 'log.txt').read_text()}")
    rows = json.loads(report.read_text())
    for row in rows:
        if not row["passed"]:
            print(f"excluded: {row['name']} does not pass without a mutant", flush=True)
    return [Test(row["name"], row["seconds"], set(row["marks"])) for row in rows if row["passed"]]


def insert_marks(source: str, lines: Mapping[int, int]) -> str:
    """The text of a file with a call before each of the given lines.

    Args:
        source: the text.
        lines: number of the mark, by line.
    """
    text = source.splitlines(keepends=True)
    for line in sorted(lines, reverse=True):
        line_text = text[line - 1]
        indent = line_text[: len(line_text) - len(line_text.lstrip())]
        text.insert(line - 1, f"{indent}_{_WATCH}({lines[line]})\n")
    future = "from __future__ import annotations\n"
    position = (
        text.index(future) + 1 if future in text else ast.parse(source).body[0].end_lineno or 0
    )
    text.insert(position, f"from {_WATCH} import seen as _{_WATCH}\n")
    return "".join(text)


def first_failure(copy: Path, tests: Sequence[Test], limit_s: float) -> tuple[str | None, float]:
    """Run tests until one fails.

    Returns:
        (name of the first test that fails or None, seconds).
    """
    report = copy / "outcome.json"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    names = [test.name for test in tests]
    # The limit is processor time, because the machine may be busy. Ten times the limit in
    # wall-clock time covers a process that does not run at all.
    status = _wait(_child(copy, lambda: _fail(names, report), limit_s), 10 * limit_s)
    seconds = time.monotonic() - start
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return f"timeout: over {limit_s:.0f} s", seconds
    if not report.exists():
        return f"process: status {status}", seconds
    return json.loads(report.read_text())["by"], seconds


def _child(copy: Path, work: Any, limit_s: float | None = None) -> int:
    """Fork. The child imports the copy, does `work` and ends.

    Args:
        limit_s: limit of processor seconds.
    Returns:
        The child's process id.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    if limit_s is not None:
        limit = int(time.process_time() + limit_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))
    with (copy / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    own_paths = {str(REPOSITORY), str(REPOSITORY / "scripts"), ""}
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in own_paths)]
    os.environ["PYTHONPATH"] = str(copy)
    try:
        work()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)


def _wait(child: int, limit_s: float) -> int | None:
    """The status of a child; None after a timeout. Also ends all processes of the child."""
    end, status = time.monotonic() + limit_s, None
    while status is None and time.monotonic() < end:
        pid, child_status = os.waitpid(child, os.WNOHANG)
        status = child_status if pid else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _import(copy: Path) -> None:
    """Import mesa_train and check that it is the copy."""
    import mesa_train

    assert mesa_train.__file__ is not None
    assert Path(mesa_train.__file__).resolve().is_relative_to(copy.resolve())


class _Noting:
    """pytest plugin that records the outcome, seconds and executed marks of each test."""

    def __init__(self, seen: set[int]) -> None:
        self.seen, self.start = seen, 0.0
        self.shared: dict[str, set[int]] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, Any]:
        """Record the marks that collection executes."""
        self.seen.clear()
        report = yield
        self._share(collector.nodeid)
        return report

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep at most `_OF_A_FILE` tests of each file."""
        files: dict[str, list[Any]] = {}
        for item in items:
            files.setdefault(item.nodeid.partition("::")[0], []).append(item)
        draw = random.Random(0)
        selected = {
            i
            for file_items in files.values()
            for i in draw.sample(file_items, min(len(file_items), _OF_A_FILE))
        }
        items[:] = [item for item in items if item in selected]

    def pytest_runtest_protocol(self) -> None:
        """Start the record of a test."""
        self.seen.clear()
        self.start = time.process_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the outcome of a phase of a test."""
        row = self.rows.setdefault(
            report.nodeid, {"name": report.nodeid, "seconds": 0.0, "passed": True}
        )
        row["seconds"] = time.process_time() - self.start
        row["passed"] &= report.passed
        if report.when == "setup":
            self._share(report.nodeid)
        if report.when == "teardown":
            row["own"] = set(self.seen)

    def _share(self, node: str) -> None:
        """Count marks executed in collection and setup for all tests of a file.

        The tests may share a fixture.
        """
        self.shared.setdefault(node.partition("::")[0], set()).update(self.seen)

    def finished(self) -> list[dict[str, Any]]:
        """The recorded rows."""
        for name, row in self.rows.items():
            row["marks"] = sorted(row.pop("own", set()) | self.shared[name.partition("::")[0]])
        return list(self.rows.values())


def _note(copy: Path, files: Sequence[str], report: Path) -> None:
    """Run test files and write the recorded rows."""
    _import(copy)
    noting = _Noting(importlib.import_module(_WATCH).SEEN)
    pytest.main([*_OPTIONS, *_QUIET, *files], plugins=[noting])
    report.write_text(json.dumps(noting.finished()))


class _First:
    """pytest plugin that runs given tests in a given order and records the first failure."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: number for number, name in enumerate(names)}
        self.by: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the given tests in the given order."""
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order),
            key=lambda item: self.order[item.nodeid],
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the first failure of a test."""
        if report.failed and self.by is None:
            self.by = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """Record the first failure of collection."""
        if report.failed and self.by is None:
            self.by = f"{report.nodeid} (collected)"


def _fail(names: Sequence[str], report: Path) -> None:
    """Run tests and write the name of the first failure."""
    sys.dont_write_bytecode = True
    try:
        _import(Path.cwd())
    except BaseException as error:
        report.write_text(json.dumps({"by": f"import: {type(error).__name__}"}))
        return
    first = _First(names)
    files = dict.fromkeys(name.partition("::")[0] for name in names)
    code = int(pytest.main(["-x", *_OPTIONS, *_QUIET, *files], plugins=[first]))
    by = first.by or (f"pytest: exit {code}" if code else None)
    report.write_text(json.dumps({"by": by}))


@contextlib.contextmanager
def changed(path: Path, source: str) -> Iterator[None]:
    """Context manager in which a file has another text."""
    before = path.read_text()
    _replace(path, source)
    try:
        yield
    finally:
        _replace(path, before)


def _replace(path: Path, source: str) -> None:
    """Write a file and remove its cached bytecode."""
    # Python does not notice a change that keeps a file's size and second of modification.
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
        cached.unlink()
    path.write_text(source)
