"""Training parity: a small ViT from scratch with several seeds, plain against policies.

All runs of one seed start from the same weights and take turns step by step over the same batches,
so times are comparable too. When a seed is complete, a row for each epoch goes to
docs/results/train_parity.jsonl. A seed and policy that already have rows with the same settings do
not run again.

The last row of a run has the distance of its weights from those of `plain` with the same seed, as a
share of the way that `plain` went from its first weights. `perturbed` is `plain` with first weights
that differ by one millionth. Its distance shows how far rounding alone takes a run.

    python scripts/bench/train_parity.py
    python scripts/bench/train_parity.py --policies plain,mesa4-recompute --seeds 0,1,2,3,4
    python scripts/bench/train_parity.py --data cifar10:DIRECTORY --float32 --epochs 20
    python scripts/bench/train_parity.py --policies plain,scripts/bench/policies/mesa3.yaml
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import mesa_train
from mesa_train import Policy
from mesa_train.methods.apply import PLAIN
from mesa_train.training import small_models as models
from mesa_train.training.data.packaged import ImageSet, Split, light_augmentation, load
from mesa_train.training.progress import Dashboard
from mesa_train.training.trainer import EpochResult, TrainConfig, Trainer, fit
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/train_parity.jsonl"
# A run without a policy whose first weights are multiplied by 1 + PERTURBATION * normal noise.
PERTURBED = "perturbed"
PERTURBATION = 1e-6


def main(
    policies: Annotated[
        str,
        typer.Option(help="Comma-separated; plain, perturbed, a preset, or a policy's YAML file."),
    ] = "plain,mesa8,mesa4,paper",
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0,1,2",
    model: Annotated[str, typer.Option(help="small_vit, or a timm model.")] = models.SMALL_VIT,
    data: Annotated[str, typer.Option(help="mnist5k, digits, or cifar10:DIRECTORY.")] = "mnist5k",
    train_images: Annotated[
        int | None, typer.Option(min=1, help="The first so many training images. Default: all.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    float32: Annotated[bool, typer.Option("--float32", help="No bf16 autocast.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Train every policy with every seed and record each epoch."""
    try:
        named = dict(policy_of(name.strip()) for name in policies.split(","))
        names = list(named)
        numbers = [int(seed) for seed in seeds.split(",")]
        images = load(data)
        if train_images is not None:
            first = Split(*(t[:train_images] for t in (images.train.images, images.train.labels)))
            images = dataclasses.replace(images, train=first)
        config = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            autocast=None if float32 else torch.bfloat16,
        )
        images.steps_per_epoch(batch_size)
        saved = {
            name: saved_bytes(model, images, config, name, policy) for name, policy in named.items()
        }
    except (ValueError, ImportError) as error:
        raise SystemExit(f"train_parity: {error}") from None

    settings = describe(model, images, config)
    finished = {
        (row["name"], row["seed"])
        for row in records.read(out)
        if row["settings"] == settings and row["epoch"] == epochs
    }
    due = {seed: [name for name in names if (name, seed) not in finished] for seed in numbers}
    runs = sum(map(len, due.values()))
    console = Console()
    console.print(f"{runs} runs to do, {len(names) * len(numbers) - runs} done before")
    total = runs * epochs * images.steps_per_epoch(batch_size)
    with Dashboard(
        model, saved, total_steps=total, batch_size=batch_size, console=console
    ) as dashboard:
        for seed, missing in due.items():
            if not missing:
                continue
            dashboard.restart(f"{model} on {images.name}, seed {seed}")
            rows = []
            due_policies = {name: named[name] for name in missing}
            trainers, images_of_model = trainers_of(due_policies, model, images, config, seed)
            start = weights(trainers[missing[0]])
            for result in train(trainers, images_of_model, config, seed, dashboard):
                dashboard.on_epoch(result)
                row = {**result.row(), "seed": seed, "saved_bytes": saved[result.name]}
                if result.epoch == epochs and PLAIN in trainers:
                    row["weight_distance"] = distance(trainers, result.name, start)
                rows.append({**row, "settings": settings, **records.provenance()})
            records.append(out, *rows)
    rows_path = os.path.relpath(out)
    console.print(
        f"rows in {rows_path}; draw them with scripts/bench/plot_parity.py", soft_wrap=True
    )


def policy_of(text: str) -> tuple[str, Policy | None]:
    """The name of a run and its policy. A file's run has the name of the file without `.yaml`."""
    if text in (PLAIN, PERTURBED):
        return text, None
    if text.endswith(".yaml"):
        if not Path(text).is_file():
            raise ValueError(f"--policies: there is no file {text}")
        return Path(text).stem, Policy.from_yaml(text)
    return text, Policy.preset(text)


def build(
    name: str, policy: Policy | None, model: str, images: ImageSet, seed: int
) -> tuple[nn.Module, ImageSet]:
    """The model of one run, wrapped if it has a policy."""
    module, images = models.build(model, images, seed=seed)
    if name == PERTURBED:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + PERTURBATION * torch.randn_like(parameter))
    return module if policy is None else mesa_train.wrap(module, policy), images


def saved_bytes(
    model: str, images: ImageSet, config: TrainConfig, name: str, policy: Policy | None
) -> int:
    """Bytes that one run saves for the backward of a whole batch."""
    module, images = build(name, policy, model, images, seed=0)
    batch = images.normalise(images.train.images[: config.batch_size].float() / 255)
    return mesa_train.footprint(module.train(), batch, autocast=config.autocast).saved_bytes


def trainers_of(
    policies: dict[str, Policy | None],
    model: str,
    images: ImageSet,
    config: TrainConfig,
    seed: int,
) -> tuple[dict[str, Trainer], ImageSet]:
    """A trainer for each name, and the images in the model's input size."""
    config = dataclasses.replace(config, seed=seed)
    trainers = {}
    for name, policy in policies.items():
        module, resized = build(name, policy, model, images, seed)
        trainers[name] = Trainer(module, config, resized.steps_per_epoch(config.batch_size))
    return trainers, resized


def train(
    trainers: dict[str, Trainer],
    images: ImageSet,
    config: TrainConfig,
    seed: int,
    dashboard: Dashboard,
) -> Iterator[EpochResult]:
    """Run all trainers with one seed, in turns. Yields the results of `fit`."""
    config = dataclasses.replace(config, seed=seed)
    transform = light_augmentation(images)
    return fit(trainers, images, config, transform=transform, watch=dashboard.on_step)


def weights(trainer: Trainer) -> Tensor:
    """All weights of a trainer's model, as one vector."""
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def distance(trainers: dict[str, Trainer], name: str, start: Tensor) -> float:
    """The distance of a run's weights from plain's, as a share of plain's way from `start`."""
    plain = weights(trainers[PLAIN])
    return float((weights(trainers[name]) - plain).norm() / (plain - start).norm())


def describe(model: str, images: ImageSet, config: TrainConfig) -> records.Row:
    """The settings that must agree for two runs to be comparable. The seed may differ."""
    settings = dataclasses.asdict(config)
    del settings["seed"]
    settings["autocast"] = str(config.autocast).removeprefix("torch.")
    return {"model": model, "data": images.name, "train_images": len(images.train), **settings}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
