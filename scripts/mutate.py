"""Mutation testing: makes random wrong changes of the package, one at a time, and runs the fast tests of
their area. A mutant that no test notices shows a line that no test guards.

    python scripts/mutate.py --count 200 --seed 0
    python scripts/mutate.py --areas ops --count 40       more of one area
    python scripts/mutate.py --survivors                  those that survived, once more
    python scripts/mutate.py --equivalent ID "the reason"
    python scripts/mutate.py --summary

Mutants are drawn without repetition; what has a row already is not run again, so a run may be cut and
continued, and a larger count adds to a smaller one. The package and its tests are copied to a temporary
folder and changed there. A mutant is met by those tests of its area that execute its statement; it counts
as killed too if they take five times as long as without it, and a minute.
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
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import mutant_tests
import typer
from mutant_tests import REPOSITORY, Test
from mutants import Mutant, mutants

RESULTS = REPOSITORY / "docs" / "results" / "mutations.jsonl"
MOST_S = 60.0  # of the tests that meet one mutant


class Area(NamedTuple):
    """sources: patterns of files below mesa_train. tests: what guards them, the nearest first."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


def _area(sources: str, tests: str) -> Area:
    return Area(tuple(sources.split()), tuple(f"tests/{test}" for test in tests.split()))


AREAS = {
    "policy": _area("policy.py", "test_policy.py test_bad_input.py test_wrap.py"),
    "stash": _area(
        "stash.py neighbours.py intercept.py wrap.py",
        "test_stash.py test_lineage.py test_stash_lifetime.py test_wrap.py test_wrap_around.py "
        "test_wrap_copies.py test_steps.py ops/test_handed_gradient.py test_running.py "
        "test_bad_input.py ops/test_packed.py",
    ),
    "offload": _area("offload.py", "test_offload.py"),
    "ops": _area(
        "ops/*.py",
        "ops/test_operators.py ops/test_handed_gradient.py ops/test_packed.py ops/test_decoded.py "
        "ops/test_permuted_gradients.py ops/test_short_attention.py ops/test_fused_forward.py "
        "test_stash.py test_lineage.py test_checkpoint_policy.py",
    ),
    "codecs": _area(
        "codecs/*.py",
        "test_codecs.py kernels/test_affine_operators.py kernels/test_bitmask_operators.py test_running.py "
        "test_policy.py test_stash.py ops/test_permuted_gradients.py",
    ),
    "planner": _area(
        "memory/planner.py memory/solver.py memory/pace.py memory/sensitivity.py memory/plays.py "
        "memory/prospect.py memory/sites.py memory/blocks.py memory/plans.py memory/costs.py",
        "memory/test_pace.py memory/test_sensitivity.py memory/test_solver.py memory/test_sites.py "
        "memory/test_planner.py",
    ),
    "memory": _area(
        "memory/footprint.py memory/timeline.py memory/compare.py memory/gradients.py "
        "memory/checkpointing.py memory/methods.py memory/recorder.py memory/scratch.py "
        "memory/standins.py memory/states.py memory/tree.py memory/text.py memory/fitting.py",
        "memory/test_compare.py memory/test_timeline.py memory/test_footprint.py "
        "memory/test_scratch.py memory/test_variants.py memory/test_terminal.py",
    ),
    "training": _area(
        "training/engine.py training/optimizers.py training/schedule_rsqrt.py training/data.py "
        "training/in_backward.py training/features.py training/robustness.py training/stability.py "
        "training/loader.py training/records.py training/checkpoints.py training/config.py "
        "training/stochastic_rounding.py",
        "training/test_engine.py training/test_optimizers.py training/test_schedule_rsqrt.py "
        "training/test_in_backward.py training/test_features.py training/test_stability.py "
        "training/test_records.py training/test_data.py training/test_pictures.py "
        "training/test_config.py training/test_checkpoints.py training/test_sources.py",
    ),
}
# Needs a GPU from its first line to its last.
APART = ("ops/attention_cuda.py",)


class Place(NamedTuple):
    """A mutant and where it is."""

    area: str
    file: str
    mutant: Mutant

    @property
    def id(self) -> str:
        """The same for the same change of the same line, wherever in the file it stands."""
        line = self.mutant.source.splitlines()[self.mutant.line - 1]
        said = "|".join((self.file, str(self.mutant.column), self.mutant.kind, line))
        return hashlib.sha1(said.encode()).hexdigest()[:10]


def main(
    count: Annotated[int, typer.Option(min=1, help="Mutants in all, with those in rows.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    areas: Annotated[str, typer.Option(help="Which of: " + ", ".join(AREAS))] = ",".join(AREAS),
    out: Annotated[Path, typer.Option(help="Rows of outcomes.")] = RESULTS,
    survivors: Annotated[bool, typer.Option("--survivors", help="Run these again.")] = False,
    equivalent: Annotated[
        tuple[str, str] | None, typer.Option(help="ID and reason: no test can notice it.")
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
        places = [p for name, area in AREAS.items() if name in names for p in _places(name, area)]
        random.Random(seed).shuffle(places)
        every = {place.id: place for place in places}
        drawn = {i: every[i] for i in list(every)[:count] if i not in rows}
        if survivors:
            again = [i for i, row in rows.items() if row["outcome"] == "survived"]
            drawn = {i: every[i] for i in again if i in every}
        _run(dict(sorted(drawn.items(), key=lambda d: names.index(d[1].area))), rows, out)
    _tell(rows)


def _places(name: str, area: Area) -> list[Place]:
    """All mutants of an area."""
    package = REPOSITORY / "mesa_train"
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        if file in APART or not any(fnmatch.fnmatchcase(file, p) for p in area.sources):
            continue
        found += [Place(name, file, mutant) for mutant in mutants(path.read_text())]
    return found


def _run(drawn: dict[str, Place], rows: dict[str, dict[str, Any]], out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        mutant_tests.copy_to(copy)
        for area in dict.fromkeys(place.area for place in drawn.values()):
            files = [t for t in AREAS[area].tests if (REPOSITORY / t).exists()]
            tests = mutant_tests.noted(copy, files, _cache(area, files))
            own = {i: place for i, place in drawn.items() if place.area == area}
            print(f"{area}: {len(own)} mutants, {len(tests)} tests", flush=True)
            for number, (i, place) in enumerate(own.items(), 1):
                rows[i] = _outcome(copy, place, _guards(place, tests))
                _write(out, rows)
                said = " ".join(str(rows[i][k]) for k in ("file", "line", "outcome", "by"))
                print(f"{area} {number}/{len(own)} {i} {said}", flush=True)


def _cache(area: str, files: list[str]) -> Path:
    """Where the lines of an area's tests are noted, for the sources and tests as they are."""
    digest = hashlib.sha1()
    for path in (
        *sorted((REPOSITORY / "mesa_train").rglob("*.py")),
        *map(REPOSITORY.joinpath, files),
    ):
        digest.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mesa_train"
    return folder / f"mutations-{area}-{digest.hexdigest()[:12]}.json"


def _guards(place: Place, tests: list[Test]) -> list[Test]:
    """The tests that run the statement, or the file where it runs on import; the shortest first, at
    most a minute of them."""
    mutant, ran = place.mutant, []
    for test in sorted(tests, key=lambda t: t.seconds):
        lines = test.lines.get(place.file, set())
        first, last = mutant.first, mutant.last
        if lines and (first is None or any(n in lines for n in range(first, last + 1))):
            ran.append(test)
    total = itertools.accumulate(test.seconds for test in ran)
    return [test for test, so_far in zip(ran, total, strict=True) if so_far <= MOST_S]


def _outcome(copy: Path, place: Place, tests: list[Test]) -> dict[str, Any]:
    """The row of a mutant."""
    mutant, path = place.mutant, copy / "mesa_train" / place.file
    by, seconds = None, 0.0
    if tests:
        limit_s = 60 + 5 * sum(test.seconds for test in tests)
        with mutant_tests.changed(path, mutant.source):
            by, seconds = mutant_tests.first_failure(copy, path, tests, limit_s)
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
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row for row in rows}


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    partial.replace(path)


def _mark(rows: dict[str, dict[str, Any]], which: str, reason: str) -> None:
    if which not in rows:
        raise SystemExit(f"no row has the id {which!r}")
    rows[which] |= {"outcome": "equivalent", "by": None, "reason": reason}


def _tell(rows: dict[str, dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["area"] for row in rows.values()):
        counts = Counter(row["outcome"] for row in rows.values() if row["area"] == name)
        print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    for row in rows.values():
        if row["outcome"] == "survived":
            print(f"{row['id']} {row['file']}:{row['line']} {row['before']} -> {row['after']}")
    outcomes = Counter(row["outcome"] for row in rows.values())
    judged = outcomes["killed"] + outcomes["survived"]
    if judged:
        share = outcomes["survived"] / judged
        print(f"{sum(outcomes.values())} mutants, {outcomes['survived']} survived: {share:.1%}")


if __name__ == "__main__":
    typer.run(main)
