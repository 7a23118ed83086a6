"""Evaluation of a frozen model by what ViT-22B was measured by, in one report.

    python recipes/evaluate/run.py                                  # scikit-learn's digits
    python recipes/evaluate/run.py --model vit_base_patch16_224 --weights pretrained
    --train IMAGENET/train --held-out IMAGENET/val --data SETS
    accelerate launch recipes/evaluate/run.py --model ...            # on several GPUs

Features are computed once and kept under OUT/features. The report is OUT/report.html, report.json
and plots.png. What cannot be measured is a row with the reason.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged
from mesa_train.training.evaluation.suite import images, page, tasks
from mesa_train.training.evaluation.suite.frozen import load_model
from mesa_train.utils import records

HUMANS = Path(__file__).parent / "data/human_responses.npz"
MISTAKES = (ValueError, ImportError, OSError)


def main(
    model: Annotated[
        str, typer.Option(help="A timm model, ours included, or a folder with a config.json.")
    ] = "moco_vit_tiny",
    weights: Annotated[
        str | None, typer.Option(help="A file, or pretrained; default: random weights.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Of a classifier in the weights.")] = None,
    tasks_: Annotated[
        str, typer.Option("--tasks", help=f"Comma-separated: {','.join(tasks.TASKS)}.")
    ] = ",".join(tasks.TASKS),
    train: Annotated[str, typer.Option(help="A folder of class folders, digits or mnist5k.")] = "digits",
    held_out: Annotated[str | None, typer.Option(help="A folder, for a folder.")] = None,
    data: Annotated[
        Path, typer.Option(help="Root of imagenet-a, -r, -v2, objectnet, model-vs-human.")
    ] = Path("data"),
    out_set: Annotated[Path | None, typer.Option(help="A folder of images from outside.")] = None,
    groups: Annotated[Path | None, typer.Option(help="CSV: file, label, group.")] = None,
    human_data: Annotated[Path, typer.Option(help="Packed human responses.")] = HUMANS,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    half: Annotated[bool, typer.Option("--half", help="Keep features in float16.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
    out: Annotated[Path, typer.Option(help="Report and cache.")] = Path("runs/evaluate"),
) -> None:  # fmt: skip
    """Evaluate a frozen model; see recipes/evaluate/README.md."""
    from accelerate import Accelerator
    from datasets import disable_progress_bars

    disable_progress_bars()
    accelerator = Accelerator(cpu=cpu)
    try:
        wanted = tasks.chosen(tasks_)
        known, test = _images(train, held_out)
        grouped = images.of_csv(groups) if groups is not None else None
        with accelerator.main_process_first():
            net = load_model(
                model, weights, size=image_size, classes=classes, device=str(accelerator.device)
            )
        cache = images.FeatureCache(net, out / "features", accelerator, batch_size, half)
        others = [name for name in packaged.BUILTIN if name != train]
        evaluation = tasks.Evaluation(
            net, known, test, cache,
            tasks.Settings(
                data, out_set, grouped, human_data,
                others[0] if train in packaged.BUILTIN else None,
            ),
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        rows = [row for name in wanted for row in tasks.TASKS[name](evaluation)]
        if accelerator.is_main_process:
            about = _about(model, weights, evaluation)
            files = page.write(out, rows, evaluation.plots, about)
            _print(rows, files)
    except MISTAKES as error:
        raise SystemExit(f"evaluate: {' '.join(str(error).split())}") from None
    accelerator.wait_for_everyone()


def _images(train: str, held_out: str | None) -> tuple[images.Images, images.Images]:
    """Training and held-out images."""
    if train in packaged.BUILTIN:
        if held_out is not None:
            raise ConfigError(f"--held-out: {train} has its own held-out images")
        return images.of_package(train)
    if held_out is None:
        raise ConfigError(
            f"--train must be one of {', '.join(packaged.BUILTIN)}, or a folder with a --held-out "
            f"folder beside it; got {train}"
        )
    return images.of_folders(train, held_out)


def _about(model: str, weights: str | None, e: tasks.Evaluation) -> dict[str, object]:
    """The head of the report."""
    where = records.provenance(e.features.accelerator.device)
    return {
        "model": model,
        "weights": weights or "random, seed 0",
        "training images": f"{len(e.train)} of {e.train.name}",
        "held-out images": f"{len(e.test)} of {e.test.name}",
        "image size": f"{e.model.size} pixels",
        "features computed": e.features.computed,
        "device": where["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in where["versions"].items()),
        "commit": where["commit"],
        "date": where["date"],
        "command": shlex.join(["python", *sys.argv]),
    }


def _print(rows: list[tasks.Row], files: list[Path]) -> None:
    from rich.console import Console

    console = Console()
    console.print(page.table(rows))
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
