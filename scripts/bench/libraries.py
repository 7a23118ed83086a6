"""Programs of five libraries with one line of mesa_train: the peak memory and the losses, beside plain.

Each program in `programs/` trains for four steps on noise, in a process of its own. The peak is the
largest resident memory of the process. It includes Python, the libraries, the weights and the data,
so a second number leaves out what the process had before the first step's forward of plain: the peak
of the same program with one image.

A row for each program and policy goes to docs/results/libraries.jsonl.

    python scripts/bench/libraries.py
    python scripts/bench/libraries.py --programs timm_loop --policies plain,mesa8-recompute
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mesa_train import PRESETS
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/libraries.jsonl"
FOLDER = Path(__file__).parent / "programs"
# By program: the library, the model, and the line that a user adds.
PROGRAMS = {
    "transformers_trainer": ("transformers, Trainer", "ViT-S", "callbacks=[MesaTrainCallback()]"),
    "lightning_module": ("Lightning", "timm's ViT-S", "callbacks=[MesaTrainCallback()]"),
    "accelerate_loop": ("Accelerate", "torchvision's ViT-B, 6 blocks", "mesa_train.wrap(model)"),
    "timm_loop": ("timm", "Swin-T", "mesa-train run train.py"),
    "open_clip_loss": ("open_clip", "ViT-S-32-alt", "mesa-train run train.py"),
}
# These programs do not know mesa_train.
UNTOUCHED = ("timm_loop", "open_clip_loss")


def main(
    programs: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(PROGRAMS)}.")
    ] = ",".join(PROGRAMS),
    policies: Annotated[
        str, typer.Option(help="Comma-separated: plain, or presets.")
    ] = "plain,mesa8,mesa8-recompute",
    images: Annotated[int, typer.Option(min=2, help="Of a batch; open_clip: four times.")] = 16,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Run the programs with the policies."""
    for option, text, known in (
        ("programs", programs, PROGRAMS),
        ("policies", policies, ("plain", *PRESETS)),
    ):
        for name in text.split(","):
            if name not in known:
                raise SystemExit(
                    f"libraries: --{option} must be of {', '.join(known)}, got {name!r}"
                )
    for program in programs.split(","):
        base, _ = run(program, "plain", 1)
        for policy in policies.split(","):
            peak, losses = run(program, policy, images)
            library, model, line = PROGRAMS[program]
            row: dict[str, Any] = {
                "program": program, "library": library, "model": model,
                "line": "" if policy == "plain" else line, "policy": policy, "images": images,
                "peak_bytes": peak, "one_image_bytes": base, "losses": losses,
            }  # fmt: skip
            print(row, flush=True)
            records.append(out, {**row, **records.provenance()})


def run(program: str, policy: str, images: int) -> tuple[int, list[float]]:
    """The peak of resident memory in bytes, and the losses, of a program in its own process.

    Raises:
        SystemExit: the program failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as text:
        command = [sys.executable]
        if program in UNTOUCHED and policy != "plain":
            command += ["-m", "mesa_train.cli", "run", "--policy", policy]
        command += [str(FOLDER / f"{program}.py"), folder, policy, str(images)]
        started = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)  # Popen did not wait
        text.seek(0)
        output = text.read()
    lines = [line for line in output.splitlines() if line.startswith("losses ")]
    if started.returncode or not lines:
        raise SystemExit(f"libraries: {program} with {policy} failed:\n{output[-2000:]}")
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, [float(value) for value in lines[-1].split()[1:]]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
