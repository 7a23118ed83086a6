"""Mutation testing: random wrong changes of the package, one at a time, against the fast tests.

A mutant that no test detects shows a line that no test guards.

    python scripts/bench/mutate.py --count 200 --seed 0
    python scripts/bench/mutate.py --areas ops --count 40       more of one area
    python scripts/bench/mutate.py --survivors                  surviving mutants again
    python scripts/bench/mutate.py --survivors --tests stash/test_stash.py
    python scripts/bench/mutate.py --equivalent ID "the reason"
    python scripts/bench/mutate.py --summary

Mutants are drawn without repetition. A mutant with a row does not run again, so a run may be
interrupted and continued, and a larger count adds to a smaller one. The script copies the package
and its tests to a temporary folder and changes the copy.

Only the tests of the mutant's area that execute its statement run against it. A mutant also counts
as killed if the tests take five times as long as without it, and a minute more.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import mutant_tests
import typer
from mutant_tests import REPOSITORY, Test
from mutants import Mutant, mutants

RESULTS = REPOSITORY / "docs" / "results" / "mutations.jsonl"
MANY = 500  # a file with more tests runs last
MOST_S = 30.0  # seconds of all tests for one mutant


class Area(NamedTuple):
    """A part of the package.

    Attributes:
        sources: patterns of files below mesa_train.
        tests: patterns of the tests that guard them; `!` excludes files.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]


def _area(sources: str, tests: str) -> Area:
    """An area from patterns separated by spaces."""
    return Area(tuple(sources.split()), tuple(tests.split()))


# A file belongs to the first area with a matching pattern.
AREAS = {
    "policy": _area(
        "policy.py utils/yaml_text.py",
        "test_policy.py test_bad_input.py engine/test_wrap.py training/classification/test_config.py",
    ),
    "offload": _area("stash/offload.py", "stash/test_offload.py"),
    "stash": _area(
        "stash/*.py engine/*.py api.py utils/torch_functions.py",
        "stash/test_*.py engine/test_*.py ops/test_fallback.py codecs/test_running.py test_bad_input.py "
        "ops/test_handed_gradient.py ops/test_packed.py ops/test_strides.py ops/test_casts.py "
        "!stash/test_offload.py !engine/test_fuzz.py !engine/test_module_info.py",
    ),
    "ops": _area(
        "ops/*.py",
        "ops/test_*.py stash/test_stash.py stash/test_lineage.py engine/test_checkpoint_policy.py "
        "engine/test_exchanged_data.py engine/test_wrap_frozen.py test_bad_input.py codecs/test_running.py "
        "!ops/test_opinfo.py",
    ),
    "codecs": _area(
        "codecs/*.py",
        "codecs/test_*.py kernels/test_affine_operators.py kernels/test_bitmask_operators.py test_policy.py "
        "stash/test_stash.py engine/test_checkpoint_policy.py ops/test_permuted_gradients.py "
        "integration/test_selective_checkpoints.py",
    ),
    "kernels": _area(
        "kernels/*.py kernels/*/*.py", "kernels/test_*.py ops/test_short_attention.py"
    ),
    "planner": _area("planner/*.py", "planner/test_*.py"),
    "memory": _area(
        "measure/*.py methods/*.py loading/*.py estimate/*.py compare/*.py report/*.py utils/*.py",
        "measure/test_*.py methods/test_*.py loading/test_*.py estimate/test_*.py report/test_*.py "
        "utils/test_*.py stash/test_offload.py !report/test_html.py",
    ),
    "training": _area(
        "training/*.py training/*/*.py", "training/test_*.py training/*/test_*.py utils/test_*.py"
    ),
}
# Files without an area: they need a GPU, run in separate processes, draw pictures, or hold no part
# of the method.
APART = (
    "ops/attention_cuda.py",
    *("compare/worker.py", "compare/fork_server.py", "compare/scheduler.py", "measure/on_gpu.py"),
    *("report/charts.py", "report/html.py", "report/figures.py"),
    *("training/vit22b/*.py", "training/optim/sharded_adamw8bit.py"),
    "training/classification/accelerated.py",
    *("__init__.py", "*/__init__.py", "cli/*.py", "integrations/*.py", "models/*.py"),
)


class Place(NamedTuple):
    """A mutant and its location."""

    area: str
    file: str
    mutant: Mutant

    @property
    def id(self) -> str:
        """The same for the same change of the same line, at any position in the file."""
        line = self.mutant.source.splitlines()[self.mutant.line - 1]
        key = "|".join((self.file, str(self.mutant.column), self.mutant.kind, line))
        return hashlib.sha1(key.encode()).hexdigest()[:10]

    @property
    def marks(self) -> set[tuple[str, int]]:
        """(file, line) of its statement; of every function of the file if it runs on import."""
        return {(self.file, line) for line in self.mutant.marks}


def main(
    count: Annotated[int, typer.Option(min=1, help="Mutants, including those with a row.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    areas: Annotated[str, typer.Option(help="Areas: " + ", ".join(AREAS))] = ",".join(AREAS),
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
    survivors: Annotated[bool, typer.Option("--survivors", help="Run survivors again.")] = False,
    tests: Annotated[str, typer.Option(help="Test files instead of the area's.")] = "",
    equivalent: Annotated[
        tuple[str, str] | None, typer.Option(help="ID and reason: no test can detect it.")
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Only count the rows.")] = False,
) -> None:
    """Run mutants that have no row yet, and append their rows."""
    rows = _read(out)
    if equivalent is not None:
        _mark(rows, *equivalent)
        _write(out, rows)
    if equivalent is None and not summary:
        names = areas.split(",")
        if unknown := [name for name in names if name not in AREAS]:
            raise SystemExit(f"no area {unknown[0]!r}; choose from {', '.join(AREAS)}")
        places = [
            place for name, of_area in _places().items() if name in names for place in of_area
        ]
        random.Random(seed).shuffle(places)
        by_id = {place.id: place for place in places}
        remaining = max(0, count - sum(row["area"] in names for row in rows.values()))
        drawn = {i: by_id[i] for i in [i for i in by_id if i not in rows][:remaining]}
        if survivors:
            survived_ids = [i for i, row in rows.items() if row["outcome"] == "survived"]
            drawn = {i: by_id[i] for i in survived_ids if i in by_id}
        _run(dict(sorted(drawn.items(), key=lambda d: names.index(d[1].area))), rows, out, tests)
    _print_summary(rows)


def _places() -> dict[str, list[Place]]:
    """All mutants of the package, by area."""
    package = REPOSITORY / "mesa_train"
    by_area: dict[str, list[Place]] = {name: [] for name in AREAS}
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        if _matches(file, APART):
            continue
        areas = [name for name, area in AREAS.items() if _matches(file, area.sources)]
        if not areas:
            raise SystemExit(f"mesa_train/{file} is neither in AREAS nor in APART")
        by_area[areas[0]] += [Place(areas[0], file, mutant) for mutant in mutants(path.read_text())]
    return by_area


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    """True if a file matches one of the patterns."""
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _tests(patterns: tuple[str, ...]) -> list[str]:
    """The test files that match these patterns, relative to the repository's root."""
    names: dict[str, None] = {}
    for pattern in patterns:
        files = sorted((REPOSITORY / "tests").glob(pattern.lstrip("!")))
        if not files:
            raise SystemExit(f"no file matches tests/{pattern.lstrip('!')}")
        for file in files:
            name = file.relative_to(REPOSITORY).as_posix()
            if pattern.startswith("!"):
                names.pop(name, None)
            else:
                names[name] = None
    return list(names)


def _run(
    drawn: dict[str, Place], rows: dict[str, dict[str, Any]], out: Path, patterns: str
) -> None:
    """Run mutants against their tests and write the rows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        mutant_tests.copy_to(copy)
        for area in dict.fromkeys(place.area for place in drawn.values()):
            files = _tests(tuple(patterns.split(",")) if patterns else AREAS[area].tests)
            of_area = {i: place for i, place in drawn.items() if place.area == area}
            marks = {
                mark: n for n, mark in enumerate({m for p in of_area.values() for m in p.marks})
            }
            tests = mutant_tests.passing_tests(copy, files, list(marks))
            sizes = Counter(test.file for test in tests)
            large = {file for file, size in sizes.items() if size > MANY}
            print(f"{area}: {len(of_area)} mutants, {len(tests)} tests", flush=True)
            for number, (i, place) in enumerate(of_area.items(), 1):
                rows[i] = _outcome(
                    copy, place, _guards({marks[m] for m in place.marks}, tests), large
                )
                _write(out, rows)
                outcome = " ".join(str(rows[i][k]) for k in ("file", "line", "outcome", "by"))
                print(f"{area} {number}/{len(of_area)} {i} {outcome}", flush=True)


def _guards(marks: set[int], tests: list[Test]) -> list[Test]:
    """The tests that execute one of these marks, shortest first, at most MOST_S seconds in all.

    A file of constants has no marks: all tests count.
    """
    executing = sorted((t for t in tests if not marks or t.marks & marks), key=lambda t: t.seconds)
    total = itertools.accumulate(test.seconds for test in executing)
    return [test for test, elapsed in zip(executing, total, strict=True) if elapsed <= MOST_S]


def _outcome(copy: Path, place: Place, tests: list[Test], large: Container[str]) -> dict[str, Any]:
    """The row of a mutant.

    Args:
        copy: the copied repository.
        place: the mutant.
        tests: that run against it.
        large: test files that run last.
    """
    mutant, path = place.mutant, copy / "mesa_train" / place.file
    by, seconds = None, 0.0
    # Collecting a file of a thousand tests takes longer than killing most mutants.
    parts = [[t for t in tests if (t.file in large) == last] for last in (False, True)]
    with mutant_tests.changed(path, mutant.source):
        for part in filter(None, parts):
            limit_s = 60 + 5 * sum(test.seconds for test in part)
            by, part_s = mutant_tests.first_failure(copy, part, limit_s)
            seconds += part_s
            if by:
                break
    return {
        "id": place.id,
        "area": place.area,
        "file": f"mesa_train/{place.file}",
        "line": mutant.line,
        "kind": mutant.kind,
        "before": mutant.before[:200],
        "after": mutant.after[:200],
        "outcome": "killed" if by else "survived",
        "by": by,
        "tests": len(tests),
        "seconds": round(seconds, 1),
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file, by id."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row for row in rows}


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write rows atomically."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    partial.replace(path)


def _mark(rows: dict[str, dict[str, Any]], mutant_id: str, reason: str) -> None:
    """Mark a mutant as equivalent."""
    if mutant_id not in rows:
        raise SystemExit(f"no row has the id {mutant_id!r}")
    rows[mutant_id] |= {"outcome": "equivalent", "by": None, "reason": reason}


def _print_summary(rows: dict[str, dict[str, Any]]) -> None:
    """Print counts by area, and the survivors."""
    for name in dict.fromkeys(row["area"] for row in rows.values()):
        counts = Counter(row["outcome"] for row in rows.values() if row["area"] == name)
        print(f"{name}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    for row in rows.values():
        if row["outcome"] == "survived":
            print(f"{row['id']} {row['file']}:{row['line']} {row['before']} -> {row['after']}")
    outcomes = Counter(row["outcome"] for row in rows.values())
    decided = outcomes["killed"] + outcomes["survived"]
    if decided:
        share = outcomes["survived"] / decided
        print(f"{sum(outcomes.values())} mutants, {outcomes['survived']} survived: {share:.1%}")


if __name__ == "__main__":
    typer.run(main)
