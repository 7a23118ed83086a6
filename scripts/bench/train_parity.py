"""Training parity: a small ViT from scratch with several seeds, plain against policies.

All runs of one seed start from the same weights and take turns step by step over the same batches,
so times are comparable too. When a seed is complete, a row for each epoch goes to
docs/results/train_parity.jsonl. A seed and policy that already have rows with the same settings do
not run again. After each epoch a checkpoint goes to runs/train_parity. If a process is killed, the
same call continues behind the last whole epoch, with the same results bit for bit.

The last row of a run has the distance of its weights from those of `plain` with the same seed, as a
share of the way that `plain` went from its first weights. `plain` may have run in an earlier call:
runs/train_parity keeps its weights. `perturbed` is `plain` with first weights that differ by one
millionth. Its distance shows how far rounding alone takes a run.

    python scripts/bench/train_parity.py
    python scripts/bench/train_parity.py --policies plain,mesa4-recompute --seeds 0,1,2,3,4
    python scripts/bench/train_parity.py --data cifar10:DIRECTORY --float32 --epochs 20
    python scripts/bench/train_parity.py --policies plain,scripts/bench/policies/mesa3-recompute.yaml
    python scripts/bench/train_parity.py --device cuda
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from parity_state import Progress, SeedFolder
from rich.console import Console
from torch import Tensor, nn

import mesa_train
from mesa_train import Policy
from mesa_train.methods.apply import PLAIN
from mesa_train.training import small_models as models
from mesa_train.training.data.packaged import ImageSet, Split, light_augmentation, load
from mesa_train.training.progress import Dashboard
from mesa_train.training.trainer import TrainConfig, Trainer, fit
from mesa_train.utils import records

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/train_parity.jsonl"
STATE = REPOSITORY / "runs/train_parity"
DEVICES = ("cpu", "cuda")
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
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
    state: Annotated[Path, typer.Option(help="Folder of checkpoints and plain's weights.")] = STATE,
) -> None:
    """Train every policy with every seed and record each epoch."""
    try:
        named = dict(policy_of(name.strip()) for name in policies.split(","))
        numbers = [int(seed) for seed in seeds.split(",")]
        check_device(device)
        images = first_images(load(data), train_images)
        config = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            autocast=None if float32 else torch.bfloat16,
            device=device,
        )
        images.steps_per_epoch(batch_size)
        saved = {
            name: saved_bytes(model, images, config, name, policy) for name, policy in named.items()
        }
    except (ValueError, ImportError) as error:
        raise SystemExit(f"train_parity: {error}") from None

    study = Study(model, images, config, saved, state)
    finished = {
        (row["name"], row["seed"])
        for row in records.read(out)
        if row["settings"] == study.settings and row["epoch"] == epochs
    }
    due = {seed: [name for name in named if (name, seed) not in finished] for seed in numbers}
    runs = sum(map(len, due.values()))
    console = Console()
    console.print(f"{runs} runs to do, {len(named) * len(numbers) - runs} done before")
    total = runs * epochs * images.steps_per_epoch(batch_size)
    with Dashboard(
        model, saved, total_steps=total, batch_size=batch_size, console=console
    ) as dashboard:
        for seed, missing in due.items():
            if missing:
                study.run({name: named[name] for name in missing}, seed, dashboard, out)
    if study.without_distance:
        console.print(
            f"rows of seed {', '.join(map(str, study.without_distance))} have no distance of the weights: "
            f"{os.path.relpath(state)} has no weights of plain with these settings",
            soft_wrap=True,
        )
    rows_path = os.path.relpath(out)
    console.print(
        f"rows in {rows_path}; draw them with scripts/bench/plot_parity.py", soft_wrap=True
    )


@dataclasses.dataclass
class Study:
    """The runs with one setting.

    Attributes:
        model: name of the model.
        images: the image set.
        config: the hyperparameters; the seed is that of a run.
        saved: bytes saved for the backward, by name of a run.
        state: folder of checkpoints and of plain's weights.
        without_distance: seeds whose rows lack the distance, because plain's weights are missing.
    """

    model: str
    images: ImageSet
    config: TrainConfig
    saved: dict[str, int]
    state: Path
    without_distance: list[int] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> records.Row:
        """The settings that must agree for two runs to be comparable. The seed may differ."""
        settings = dataclasses.asdict(self.config)
        del settings["seed"]
        settings["autocast"] = str(self.config.autocast).removeprefix("torch.")
        images = {"data": self.images.name, "train_images": len(self.images.train)}
        return {"model": self.model, **images, **settings}

    def run(
        self, named: dict[str, Policy | None], seed: int, dashboard: Dashboard, out: Path
    ) -> None:
        """Train these policies side by side with one seed, and append their rows to `out`."""
        config = dataclasses.replace(self.config, seed=seed)
        folder = SeedFolder(self.state, self.settings, seed, named)
        trainers, images = trainers_of(named, self.model, self.images, config)
        dashboard.restart(f"{self.model} on {images.name}, seed {seed}")
        progress = folder.load()
        if progress is None:
            first = weights(trainers[PLAIN]) if PLAIN in trainers else None
            progress = Progress(trainers, first, 0, [])
        trainers = progress.trainers
        dashboard.progress.advance(dashboard.task, sum(t.steps for t in trainers.values()))
        results = fit(
            trainers,
            images,
            config,
            transform=light_augmentation(images),
            watch=dashboard.on_step,
            first_epoch=progress.epochs,
        )
        for result in results:
            dashboard.on_epoch(result)
            row = {**result.row(), "seed": seed, "saved_bytes": self.saved[result.name]}
            row["parameters"] = sum(p.numel() for p in trainers[result.name].model.parameters())
            source = records.provenance(config.device)
            progress.rows.append({**row, "settings": self.settings, **source})
            if result.name == [*trainers][-1] and result.epoch < config.epochs:
                progress.epochs = result.epoch
                folder.save(progress)
        if progress.first is not None:
            folder.save_plain(progress.first, weights(trainers[PLAIN]))
        self.add_distances(progress, folder.load_plain(), seed)
        records.append(out, *progress.rows)
        folder.finish()

    def add_distances(
        self, progress: Progress, plain: tuple[Tensor, Tensor] | None, seed: int
    ) -> None:
        """Add the distance of the weights to the last row of each run.

        The distance is a share of plain's way. `plain`: its first and last weights, if known.
        """
        if plain is None:
            self.without_distance.append(seed)
            return
        first, last = plain
        for row in progress.rows:
            if row["epoch"] == self.config.epochs:
                away = weights(progress.trainers[row["name"]]) - last
                row["weight_distance"] = float(away.norm() / (last - first).norm())


def check_device(device: str) -> None:
    """Raise a ValueError if the device is none of DEVICES or not here."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA device here")


def first_images(images: ImageSet, count: int | None) -> ImageSet:
    """The image set with its first `count` training images; None: all of them."""
    if count is None:
        return images
    first = Split(*(t[:count] for t in (images.train.images, images.train.labels)))
    return dataclasses.replace(images, train=first)


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
    module, batch = module.train().to(config.device), batch.to(config.device)
    return mesa_train.footprint(module, batch, autocast=config.autocast).saved_bytes


def trainers_of(
    policies: dict[str, Policy | None],
    model: str,
    images: ImageSet,
    config: TrainConfig,
) -> tuple[dict[str, Trainer], ImageSet]:
    """A trainer for each name, and the images in the model's input size."""
    trainers = {}
    for name, policy in policies.items():
        module, resized = build(name, policy, model, images, config.seed)
        trainers[name] = Trainer(module, config, resized.steps_per_epoch(config.batch_size))
    return trainers, resized


def weights(trainer: Trainer) -> Tensor:
    """All weights of a trainer's model, as one vector in CPU memory."""
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().cpu().clone()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
