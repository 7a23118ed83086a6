"""Training parity of LITv2 under mesa_train: the quickstart recipe, several seeds, plain and coded.

Every run is the recipe itself under `accelerate launch`. A row for each epoch goes to
docs/results/litv2_parity.jsonl. A seed and policy that already have rows are not repeated.

`minutes` is the wall-clock time of the launch. `processor_minutes` is the processor time of all its
processes, which other load on the machine hardly changes. Both are null for a run that was
interrupted and continued.

    python scripts/bench/litv2_parity.py
    python scripts/bench/litv2_parity.py --processes 2 --seeds 0
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from quickstarts import processor_seconds

from mesa_train.utils import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/litv2_parity.jsonl"
LAUNCH = {1: "cpu.yaml", 2: "cpu_2_processes.yaml"}


def main(
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = "plain,mesa8",
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0,1,2",
    processes: Annotated[int, typer.Option(min=1, max=2)] = 1,
    set: Annotated[list[str], typer.Option(help="section.key=value for the recipe.")] = [],  # noqa: B006
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/litv2_parity"),
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Train every policy with every seed by the recipe."""
    settings = {"processes": processes, "changes": sorted(set)}
    done = {(row["name"], row["seed"]) for row in records.read(out) if row["settings"] == settings}
    for seed in seeds.split(","):
        for policy in policies.split(","):
            if (policy, int(seed)) in done:
                continue
            folder = work / f"{policy}-{seed}-{processes}"
            common: records.Row = {"settings": settings, **records.provenance()}
            common |= launch(
                folder, processes, [f"train.policy={policy}", f"train.seed={seed}", *set]
            )
            rows = [row for row in records.read(folder / "metrics.jsonl") if row["kind"] == "epoch"]
            records.append(out, *[{**row, **common} for row in rows])
            duration = f"{common['minutes']:.1f} min" if common["minutes"] else "several launches"
            print(f"{policy} seed {seed}: {rows[-1]['top1']:.1%} in {duration}", flush=True)


def launch(folder: Path, processes: int, changes: list[str]) -> dict[str, float | None]:
    """Run the recipe once. Returns its minutes. CalledProcessError if it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "recipes/accelerate" / LAUNCH[processes]),
        "--main_process_port", "0",
        str(ROOT / "recipes/litv2/train.py"),
        "--config", str(ROOT / "recipes/litv2/quickstart.yaml"), "--resume", "auto",
    ]  # fmt: skip
    for change in (f"train.out={folder}", *changes):
        command += ["--set", change]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    fresh = not (folder / "checkpoints").exists()
    start, computed = time.perf_counter(), processor_seconds()
    subprocess.run(command, check=True, env=environment)
    minutes = {
        "minutes": (time.perf_counter() - start) / 60,
        "processor_minutes": (processor_seconds() - computed) / 60,
    }
    return {key: value if fresh else None for key, value in minutes.items()}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
