"""Evaluation of frozen models by what ViT-22B was measured by, in one report.

    python recipes/evaluate/run.py                                  # scikit-learn's digits
    python recipes/evaluate/run.py --model vit_base_patch16_224 --weights pretrained
    --train IMAGENET/train --held-out IMAGENET/val --data SETS
    python recipes/evaluate/run.py --model NAME --weights FILE --model FOLDER --weights pretrained
    accelerate launch recipes/evaluate/run.py --model ...            # on several GPUs

Features are computed once and kept under OUT/features. The report is OUT/report.html, report.json
and plots.png. Several models have a column each. A task that fails is a row with the reason.
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged
from mesa_train.training.evaluation.suite import groups as grouping
from mesa_train.training.evaluation.suite import images, page, tasks
from mesa_train.training.evaluation.suite.frozen import FrozenModel, head_of, load_model
from mesa_train.training.recipe_config import check_out
from mesa_train.utils import records

HUMANS = Path(__file__).parent / "data/human_responses.npz"


def main(
    model: Annotated[
        list[str],
        typer.Option(help="A timm model, ours included, or a folder with a config.json; any number."),
    ] = ["moco_vit_tiny"],  # noqa: B006
    weights: Annotated[
        list[str],
        typer.Option(help="A file, pretrained, or random (default); once for each model."),
    ] = [],  # noqa: B006
    classes: Annotated[
        int | None, typer.Option(help="Of a classifier in the weights; default: read from a file.")
    ] = None,
    tasks_: Annotated[
        str, typer.Option("--tasks", help=f"Comma-separated: {','.join(tasks.TASKS)}.")
    ] = ",".join(tasks.TASKS),
    train: Annotated[
        str, typer.Option(help="A folder of class folders, digits, mnist5k or scattered_digits.")
    ] = "digits",
    held_out: Annotated[str | None, typer.Option(help="A folder, for a folder.")] = None,
    data: Annotated[
        Path, typer.Option(help="Root of imagenet-a, -r, -v2, objectnet, model-vs-human.")
    ] = Path("data"),
    out_set: Annotated[Path | None, typer.Option(help="A folder of images from outside.")] = None,
    groups: Annotated[Path | None, typer.Option(help="CSV: file, label, group.")] = None,
    human_data: Annotated[Path, typer.Option(help="Packed human responses.")] = HUMANS,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    views: Annotated[
        int, typer.Option(min=1, help="Of a training image for the probe; more than 1: mild crops.")
    ] = 1,
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
        check_out(str(out), "--out")
        known, test = _images(train, held_out)
        outside = images.of_any(out_set, "--out-set") if out_set is not None else None
        grouped = grouping.of_csv(groups) if groups is not None else None
        pairs = paired(model, weights)

        def loaded(name: str, file: str | None) -> FrozenModel:
            with accelerator.main_process_first():
                return load_model(
                    name, file, size=image_size, classes=classes_of(name, file, classes),
                    device=str(accelerator.device),
                )  # fmt: skip

        # A mistake in the last model is told before the first one is evaluated.
        for pair in pairs[1:]:
            loaded(*pair)
        others = [name for name in packaged.BUILTIN if name != train]
        other = others[0] if train in packaged.BUILTIN else None
        settings = tasks.Settings(data, outside, grouped, human_data, other, views)
        reports: list[page.Report] = []
        for name, file in pairs:
            net = loaded(name, file)
            cache = images.FeatureCache(net, out / "features", accelerator, batch_size, half)
            evaluation = tasks.Evaluation(net, known, test, cache, settings)
            _measure(evaluation, wanted, name, file, reports, out)
        if accelerator.is_main_process:
            _print(reports, page.write(out, reports))
    except tasks.MISTAKES as error:
        raise SystemExit(f"evaluate: {' '.join(str(error).split())}") from None
    accelerator.wait_for_everyone()


def _measure(
    e: tasks.Evaluation, wanted: list[str], name: str, file: str | None,
    reports: list[page.Report], out: Path,
) -> None:  # fmt: skip
    """Run the tasks on a model and append its report, which is written even if a task has a bug."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[tasks.Row] = []
    try:
        for task in wanted:
            rows += tasks.tried(task, e.test.name, partial(tasks.TASKS[task], e))
    except BaseException:
        if e.features.accelerator.is_main_process and rows:
            page.write(out, [*reports, page.Report(_about(name, file, e), rows, e.plots)])
        raise
    reports.append(page.Report(_about(name, file, e), rows, e.plots))


def paired(models: list[str], weights: list[str]) -> list[tuple[str, str | None]]:
    """Each model with its weights; None for random ones.

    Raises:
        ConfigError: there are weights, but not for each model; or a model is named twice.
    """
    if weights and len(weights) != len(models):
        raise ConfigError(
            f"--weights must be given for each --model, in their order: got {len(weights)} for "
            f"{len(models)} models; random stands for random weights"
        )
    files = [None if file == "random" else file for file in weights] or [None] * len(models)
    pairs = list(zip(models, files, strict=True))
    if len(set(pairs)) < len(pairs):
        raise ConfigError("--model: the same model with the same weights is given twice")
    return pairs


def classes_of(model: str, weights: str | None, asked: int | None) -> int | None:
    """The classes of a classifier: as asked, else as in a safetensors file; None for the model's."""
    if asked is not None or weights is None or (Path(model) / "config.json").is_file():
        return asked
    return head_of(weights)


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
        "weights": weights or ("its own" if e.model.hub else "random, seed 0"),
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


def _print(reports: list[page.Report], files: list[Path]) -> None:
    from rich.console import Console

    console = Console()
    console.print(page.table(reports))
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
