"""Check and measure a GPU in one run that always ends with rows.

The sections run in one worker process, the most valuable first (`gpu_worker.py`). A section that
raises an error is a row with the error, and the next section runs. If the worker crashes, hangs in a
section, or loses the GPU's context, that section is a row with the error too, and a new worker runs
the rest. A section that no longer fits into the budget is a row that says so. A row is written as
soon as it is measured.

    bash scripts/bench/gpu.sh
    python3 scripts/bench/gpu_first_run.py --device cpu --out DIR    small sizes, seconds
    python3 scripts/bench/gpu_first_run.py --sections attention,"step plain"

It needs PyTorch, and timm for the models. It needs no installation of mesa_train, no network and no
git. Rows go to OUT/gpu_first_run.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ROWS = "gpu_first_run.jsonl"
# Seconds for a worker's start: imports and the GPU's context.
START_S = 180


def main() -> None:
    """Run all sections, in as many workers as it takes."""
    arguments = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(arguments)
    while supervisor.run_worker():
        pass
    supervisor.write("end", seconds=round(supervisor.elapsed(), 1))
    print(f"gpu_first_run: {supervisor.elapsed():.0f} s; rows in {supervisor.path}", flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs/results")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for the whole run")
    parser.add_argument("--sections", default="", help="comma-separated; default: all")
    return parser.parse_args()


class Supervisor:
    """Starts workers, watches them, and writes the rows that a dead worker cannot write.

    Attributes:
        path: the file of the rows.
        begun: the sections that have started or that were skipped.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.path = arguments.out / ROWS
        self.start = time.time()
        self.begun: list[str] = []
        self.failed_starts = 0

    def elapsed(self) -> float:
        """Seconds since the start of the run."""
        return time.time() - self.start

    def write(self, section: str, **values: Any) -> None:
        """Append a row."""
        row = {"section": section, "at": round(self.elapsed(), 1), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def run_worker(self) -> bool:
        """Run a worker to its end. True if sections are left for another one."""
        process, lines = self._started()
        section, limit = "start", float(START_S)
        since = time.time()
        while True:
            try:
                line = lines.get(timeout=max(0.1, since + limit - time.time()))
            except queue.Empty:
                process.kill()
                process.wait()
                return self._died(section, f"ended after {limit:.0f} s without a result")
            if line is None:
                code = process.wait()
                if code == 0:
                    return False
                reason = f"signal {-code}" if code < 0 else f"exit code {code}"
                return self._died(section, f"the process ended with {reason}")
            since = time.time()
            word, _, rest = line.partition(" ")
            if word == "begin":
                seconds, _, section = rest.partition(" ")
                limit = float(seconds)
                self.begun.append(section)
            elif word == "end":
                section, limit = "between sections", float(START_S)
            elif word == "lost":
                # The worker has written the row of the section. Its GPU context is gone.
                process.wait()
                return True

    def _started(self) -> tuple[subprocess.Popen[bytes], queue.Queue[str | None]]:
        """A new worker, and the lines that it sends."""
        reading, writing = os.pipe()
        job = {
            "device": self.arguments.device,
            "path": str(self.path),
            "start": self.start,
            "budget": self.arguments.budget,
            "sections": [s.strip() for s in self.arguments.sections.split(",") if s.strip()],
            "begun": self.begun,
            "pipe": writing,
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "gpu_worker.py"), json.dumps(job)], pass_fds=(writing,)
        )
        os.close(writing)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            with os.fdopen(reading, encoding="utf-8") as pipe:
                for line in pipe:
                    lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        return process, lines

    def _died(self, section: str, error: str) -> bool:
        """Write the row of a dead worker. True if another worker makes sense."""
        self.write(section, error=error, device_type=self.arguments.device)
        print(f"gpu_first_run: {section}: {error}", flush=True)
        if section == "start":
            self.failed_starts += 1
        return self.failed_starts < 2 and self.elapsed() < self.arguments.budget


if __name__ == "__main__":
    main()
