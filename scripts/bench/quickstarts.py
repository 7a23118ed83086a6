"""Runs of the quickstarts of recipes/efficient: whole, killed and resumed, and their memory.

Each quickstart runs to its end. Then a copy of the run, without its last checkpoint, continues, is killed
by SIGKILL in the middle of the last epoch, and is resumed. Both runs must end with the same scores and the
same weights. Then one more step of the run is measured, and compared with the memory that `--dry-run`
predicts. A row for each quickstart goes to docs/results/quickstarts.jsonl.

A second stage reads the files of the stage before it, so the stages run in the order of `QUICKSTARTS`.

    python scripts/bench/quickstarts.py
    python scripts/bench/quickstarts.py --only hvt_quickstart --prefix "nice -n 10"
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from mesa_train.utils import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/quickstarts.jsonl"
RECIPE = ROOT / "recipes/efficient"
QUICKSTARTS = (
    "hvt_quickstart",
    "dynamicvit_quickstart_backbone",
    "dynamicvit_quickstart",
    "ecoformer_quickstart_msa",
    "ecoformer_quickstart",
    "spvit_quickstart_deit",
    "spvit_quickstart_search",
    "spvit_quickstart",
)
SCORES = ("train_loss", "val_loss", "top1", "top5")


def main(
    only: Annotated[str, typer.Option(help="Comma-separated names; default: all.")] = "",
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/quickstarts"),
    prefix: Annotated[str, typer.Option(help="Put before each training command.")] = "",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Run the quickstarts and append a row for each."""
    names = [name.strip() for name in only.split(",")] if only else list(QUICKSTARTS)
    if unknown := [name for name in names if name not in QUICKSTARTS]:
        raise SystemExit(
            f"quickstarts: --only: no quickstart {unknown[0]}; choose from {', '.join(QUICKSTARTS)}"
        )
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        row = {"name": name, **runs(name, work, shlex.split(prefix))}
        records.append(out, {**row, **records.provenance()})
        print(
            f"{name}: top-1 {row['top1']:.1%}, killed after step {row['killed_after']}, "
            f"the same after the resume: {row['same']}",
            flush=True,
        )


def runs(name: str, work: Path, prefix: list[str]) -> records.Row:
    """Run a quickstart, then its last epoch killed and resumed. Returns the row without its origin."""
    command = [
        *prefix, sys.executable, str(RECIPE / "train.py"), "--config", str(RECIPE / f"{name}.yaml"),
    ]  # fmt: skip
    whole, parted = work / "runs" / name, work / "runs" / f"{name}_killed"
    if not (whole / "curves.png").exists():
        run(command, work)
    steps, epochs = of_kind(whole, "step"), of_kind(whole, "epoch")
    last = epochs[-1]
    per_epoch = last["step"] // last["epoch"]
    shutil.rmtree(parted, ignore_errors=True)
    shutil.copytree(whole, parted, symlinks=True)
    shutil.rmtree(checkpoints(parted)[-1])
    again = [*command, "--set", f"train.out=runs/{parted.name}", "--resume", "auto"]
    killed_after = killed(again, work, parted, last["step"] - per_epoch, per_epoch // 2)
    run(again, work)
    same = [[row[key] for key in SCORES] for row in epochs] == [
        [row[key] for key in SCORES] for row in of_kind(parted, "epoch")
    ] and same_weights(whole, parted)
    measured = subprocess.run(
        [*prefix, sys.executable, str(Path(__file__)), "--measure", name],
        cwd=work, check=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    return {
        "epochs": last["epoch"],
        "steps": last["step"],
        **{key: last[key] for key in SCORES},
        "best_top1": max(row["top1"] for row in epochs),
        "images_per_s": max(row["images_per_s"] for row in steps),
        "killed_after": killed_after,
        "resumed_from": last["step"] - per_epoch,
        "same": same,
        **json.loads(measured.stdout.splitlines()[-1]),
    }


def run(command: list[str], work: Path) -> None:
    """Run a command in the folder of the runs. CalledProcessError if it fails."""
    subprocess.run(command, cwd=work, check=True, env=environment(), stdout=subprocess.DEVNULL)


def processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def killed(command: list[str], work: Path, folder: Path, start: int, steps: int) -> int:
    """Continue a run and kill it once it has logged enough steps.

    Args:
        command: continues the run.
        work: folder of the runs.
        folder: of the run.
        start: the step of its checkpoint.
        steps: least number of further steps.
    Returns:
        The last step in its log.
    """
    process = subprocess.Popen(
        command, cwd=work, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    begun = False
    while process.poll() is None:
        logged = [row["step"] for row in of_kind(folder, "step")]
        # The continued run first removes the rows behind its checkpoint.
        begun = begun or logged[-1] <= start
        if begun and logged[-1] >= start + steps:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return int(logged[-1])
        time.sleep(0.1)
    raise SystemExit(f"quickstarts: {folder.name} ended before step {start + steps}")


def checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*"))


def of_kind(folder: Path, kind: str) -> list[records.Row]:
    """The rows of a run's metrics of one kind."""
    return [row for row in records.read(folder / "metrics.jsonl") if row["kind"] == kind]


def same_weights(one: Path, other: Path) -> bool:
    """True if the newest checkpoints of two runs have the same weights, bit for bit."""
    from safetensors.torch import load_file

    newest = [checkpoints(folder)[-1] for folder in (one, other)]
    first, second = (load_file(folder / "model.safetensors") for folder in newest)
    if newest[0].name != newest[1].name:
        return False
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(_bits(value), _bits(second[key]))
        for key, value in first.items()
    )


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor. Bytes of nan are equal, values are not."""
    return value.flatten().view(torch.uint8)


def environment() -> dict[str, str]:
    """The environment of a run, which imports this checkout."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def measure(name: str) -> dict[str, dict[str, int]]:
    """The predicted and the measured bytes of a quickstart's first step, in this process.

    Returns:
        "predicted": bytes by use, as a dry run predicts. "measured": bytes saved for the
            backward, and the most bytes allocated at once, weights, optimizer states and
            teacher included.
    """
    from mesa_train.measure.peak import peak_of
    from mesa_train.measure.saved_tensors import Recorder
    from mesa_train.training.classification import dry_run as plan
    from mesa_train.training.classification import fit as recipe
    from mesa_train.training.classification.config import load

    changes = ["train.out=runs/measured", "train.tracker=none"]
    run = recipe.prepare(load(RECIPE / f"{name}.yaml", changes))
    predicted = plan.memory(run.config, run.classes)
    run.method.begin(run)
    batches = run.batches()
    run.step(batches)  # the first step allocates the optimizer's states
    images, labels, _ = next(batches)
    recorder = Recorder()
    with recorder.recording(run.bare):
        loss = run.loss(*run.inputs(images, labels))
    saved = sum(storage.saved_bytes for storage in recorder.storages())
    del loss, recorder
    peak = peak_of(lambda: run.step(iter([(images, labels, [])])), run.accelerator.device)
    # What a step finds allocated already.
    there = sum(predicted.get(part, 0) for part in ("weights", "optimizer", "teacher"))
    return {
        "predicted": predicted,
        "measured": {"activations": saved, "peak": peak.allocated_bytes + there},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        app = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        app.command()(main)
        app()
