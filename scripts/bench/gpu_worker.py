"""The worker of `gpu_first_run.py`: runs the sections, and writes a row for each result.

A section is a function of a `Bench`. It writes any number of rows. If it returns without one, the
worker writes its row.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
# A plain copy of the repository is not installed.
sys.path.insert(0, str(REPOSITORY))
if __name__ == "__main__" and json.loads(sys.argv[1])["device"] == "cuda":
    # The C++ kernels are for the CPU. To compile them would take up to 45 s of the budget.
    os.environ.setdefault("MESA_TRAIN_CPU_KERNELS", "0")

import torch  # noqa: E402

from mesa_train.utils import records  # noqa: E402


class Section(NamedTuple):
    """One part of the run.

    Attributes:
        name: of its rows.
        seconds: that it takes on an H200, with compilation. It starts only if so many are left.
        run: the function.
        gpu_only: whether a CPU has no such thing.
    """

    name: str
    seconds: float
    run: Callable[[Bench], None]
    gpu_only: bool = False


class Bench:
    """The device, the sizes and the rows of a section.

    Attributes:
        device: "cuda" or "cpu".
        tiny: sizes for a dry run.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.device: str = job["device"]
        self.tiny = self.device == "cpu"
        self.path = Path(job["path"])
        self.start: float = job["start"]
        self.budget: float = job["budget"]
        self.section = "start"
        self.rows = 0
        self.common = {**records.provenance(self.device), "sources": sources()}

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - (time.time() - self.start)

    def row(self, **values: Any) -> None:
        """Write a row of the current section now."""
        at = round(time.time() - self.start, 1)
        row = {"section": self.section, "at": at, **values, **self.common}
        records.append(self.path, json.loads(json.dumps(row, default=str)))
        self.rows += 1
        print(json.dumps({"section": self.section, "at": at, **values}, default=str), flush=True)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory back to the device."""
        gc.collect()
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@functools.cache
def sources() -> str:
    """A short hash of the package's files: a plain copy has no commit."""
    digest = hashlib.sha256()
    package = REPOSITORY / "mesa_train"
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def sections() -> list[Section]:
    """All sections, the most valuable first."""
    import gpu_checks as checks
    import gpu_steps as steps

    main_methods = ("plain", "mesa8", "mesa4", "mesa8-recompute", "mesa4-recompute", "checkpoint")
    later_methods = ("mesa6", "mesa8-fused", "mesa8+offload")
    return [
        # The first call of mesa_train compiles its native rows.
        Section("environment", 60, checks.environment),
        Section("attention", 30, checks.attention),
        *[Section(f"step {m}", 20, functools.partial(steps.step, m)) for m in main_methods],
        Section("gradients", 20, checks.gradients),
        *[
            Section(f"graph {m}", 20, functools.partial(steps.graph, m), gpu_only=True)
            for m in ("plain", "mesa8")
        ],
        *[Section(f"step {m}", 20, functools.partial(steps.step, m)) for m in later_methods],
        Section("profile", 15, steps.profile),
        Section("operators", 100, checks.operators),
        *[
            Section(f"training {m}", 25, functools.partial(steps.training, m))
            for m in ("plain", "mesa8", "mesa4")
        ],
        *[
            Section(f"model {name}", 25, functools.partial(steps.model, name))
            for name in steps.MODELS
        ],
        *[
            Section(f"compile {m}", 60, functools.partial(steps.compiled, m))
            for m in ("plain", "mesa8")
        ],
    ]


def main() -> None:
    """Run the sections that the job asks for and that no earlier worker has begun."""
    job = json.loads(sys.argv[1])
    with os.fdopen(job["pipe"], "w", encoding="utf-8") as pipe:

        def say(line: str) -> None:
            pipe.write(line + "\n")
            pipe.flush()

        bench = Bench(job)
        for section in sections():
            wanted = not job["sections"] or section.name in job["sections"]
            if not wanted or section.name in job["begun"]:
                continue
            bench.section, bench.rows = section.name, 0
            say(f"begin {limit_of(section, bench):.0f} {section.name}")
            begin = time.time()
            if section.gpu_only and bench.device == "cpu":
                bench.row(skipped="needs a GPU")
            elif bench.left() < needed(section, bench):
                bench.row(
                    skipped=f"{bench.left():.0f} s are left, {section.seconds:.0f} are needed"
                )
            else:
                run(section, bench)
                bench.row(done=True, seconds=round(time.time() - begin, 1))
            say(f"end {section.name}")
            if not healthy(bench):
                say("lost")
                os._exit(0)
    # No clean-up of CUDA: it may hang.
    sys.stdout.flush()
    os._exit(0)


def needed(section: Section, bench: Bench) -> float:
    """Seconds that must be left for a section to start. A dry run takes fewer."""
    return 1.0 if bench.tiny else section.seconds


def limit_of(section: Section, bench: Bench) -> float:
    """Seconds after which the supervisor ends a section that hangs."""
    return max(10.0, min(4 * section.seconds, bench.left()))


def run(section: Section, bench: Bench) -> None:
    """Run a section; an error becomes a row."""
    try:
        section.run(bench)
    except Exception as error:
        where = traceback.format_exc().splitlines()[-7:]
        bench.row(error=f"{type(error).__name__}: {str(error)[:400]}", where=where)
    with contextlib.suppress(RuntimeError):
        bench.free()


def healthy(bench: Bench) -> bool:
    """True if the GPU still computes. After an illegal access no call of the process works."""
    if bench.device == "cpu":
        return True
    try:
        return bool(torch.ones(8, device="cuda").sum().item() == 8)
    except RuntimeError:
        return False


if __name__ == "__main__":
    main()
