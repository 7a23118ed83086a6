"""Training of a ViT on 4,000 handwritten digits with and without mesa_train, step by step in turn.

Both models start from the same weights and see the same batches. They differ only in the saved
tensors: PyTorch saves the tensors themselves, mesa_train saves codes.

    python recipes/quickstart/train.py
    python recipes/quickstart/train.py --policy mesa4-recompute --epochs 12
    python recipes/quickstart/train.py --model litv2_tiny --lr 2e-3
    python recipes/quickstart/train.py --model deit3_small_patch16_224 --image-size 64
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import mesa_train
from mesa_train.report import figures as plots
from mesa_train.training import small_models as models
from mesa_train.training.data.packaged import light_augmentation, load
from mesa_train.training.progress import Dashboard, waiting
from mesa_train.training.trainer import EpochResult, TrainConfig, Trainer, fit
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.precision import choose


def main(
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(mesa_train.PRESETS)}.")] = "mesa8",
    model: Annotated[
        str, typer.Option(help="small_vit, or a model that timm knows.")
    ] = models.SMALL_VIT,
    data: Annotated[str, typer.Option(help="mnist5k or digits.")] = "mnist5k",
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels; default: 28 for small_vit, at most 64 for timm."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: int = 0,
    precision: Annotated[
        str, typer.Option(help="auto (what the device computes in), no (float32), bf16 or fp16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/quickstart"),
) -> None:
    """Train one model with and without mesa_train, side by side."""
    console, metrics = Console(), out / "metrics.jsonl"
    try:
        images = load(data)
        check_device(device)
        chosen = choose(precision, device)
        config = TrainConfig(
            epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, device=device,
            autocast=chosen.dtype,
        )  # fmt: skip
        steps = images.steps_per_epoch(batch_size)
        plain, images = models.build(model, images, seed=seed, image_size=image_size)
        ours, _ = models.build(model, images, seed=seed, image_size=image_size)
        mesa_train.wrap(ours, policy)
        # Checked here, not after the first epoch.
        out.mkdir(parents=True, exist_ok=True)
        metrics.unlink(missing_ok=True)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"quickstart: {error}") from None

    console.print(chosen.line, highlight=False, soft_wrap=True)
    runs = {"plain": plain, policy: ours}
    with waiting("counting what each run keeps (the first use builds the C++ kernels)", console):
        batch = images.normalise(images.train.images[:batch_size].float() / 255).to(device)
        kept = {
            name: mesa_train.footprint(
                module.to(device).train(), batch, autocast=config.autocast
            ).saved_bytes
            for name, module in runs.items()
        }
    trainers = {name: Trainer(module, config, steps) for name, module in runs.items()}
    arithmetic = "float32" if chosen.dtype is None else f"{chosen.name} autocast"
    title = f"{model} on {len(images.train):,} images of {images.name}, {arithmetic}"
    results: list[EpochResult] = []
    try:
        with Dashboard(
            title, kept, total_steps=2 * epochs * steps, batch_size=batch_size, console=console
        ) as dashboard:
            for result in fit(
                trainers, images, config, transform=light_augmentation(), watch=dashboard.on_step
            ):
                dashboard.on_epoch(result)
                results.append(result)
                row = {**result.row(), "seed": seed, "saved_bytes": kept[result.name]}
                records.append(metrics, row)
        picture = out / "curves.png"
        draw(records.read(metrics), kept, title, picture)
    except OSError as error:
        raise SystemExit(f"quickstart: {error}") from None
    console.print(summary(results, kept))
    console.print(f"curves   {picture}\nmetrics  {metrics}", highlight=False, soft_wrap=True)


def check_device(device: str) -> None:
    """Raise ValueError for an unknown device, or for one that this machine lacks."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")


def summary(results: list[EpochResult], kept: dict[str, int]) -> Table:
    """A table of both runs' last epoch and their comparison."""
    table = Table(title="Summary", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run")
    for heading in (
        "saved for\nbackward", "less than\nplain", "time of\na step", "time vs.\nplain",
        "held-out\nloss", "held-out\naccuracy",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    step_ms = {
        name: statistics.median(r.step_ms for r in results if r.name == name) for name in kept
    }
    for name, last in {r.name: r for r in results}.items():
        table.add_row(
            name,
            format_bytes(kept[name]),
            f"{kept['plain'] / kept[name]:.2f}x",
            f"{step_ms[name]:.0f} ms",
            f"{step_ms[name] / step_ms['plain']:.2f}x",
            f"{last.val_loss:.3f}",
            f"{last.val_accuracy:.1%}",
        )
    return table


def draw(rows: list[records.Row], kept: dict[str, int], title: str, path: Path) -> None:
    """Draw loss, accuracy and saved bytes of both runs."""
    figure, (loss, accuracy, memory) = plots.figure(3, title)
    plots.curves(loss, rows, "train_loss", "training loss")
    plots.curves(accuracy, rows, "val_accuracy", "held-out accuracy (%)", scale=100)
    mebibytes = {name: size / 2**20 for name, size in kept.items()}
    plots.bars(memory, mebibytes, "saved for the backward", "MiB")
    plots.save(figure, path)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
