"""A run of MoCo v3: steps one view at a time, nearest neighbours, checkpoints.

The views of a step depend on (seed, epoch, image) only, and its drop path on (seed, step). A
checkpoint holds all other state, so a run that was killed continues exactly. Gradients are averaged
over processes after both views, and batch norms have the statistics of all processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.models.moco import LARS, MoCo, adamw, backward_by_view, learning_rate, momentum
from mesa_train.models.moco.backward import average_gradients
from mesa_train.models.moco.batch_norm import synchronise
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.loader import Batch, Loader
from mesa_train.training.data.sources import Samples, Sources, keeping_random_state, seed_all
from mesa_train.training.evaluation.fewshot import knn
from mesa_train.training.recipe_run import CHECKPOINTS as CHECKPOINTS
from mesa_train.training.recipe_run import RecipeRun
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.precision import choose

from .config import Config
from .views import transforms

# Parts of the model whose gradient norms are reported: a dip of the accuracy follows a spike of the
# first blocks' gradients.
WATCHED = ("base_encoder.patch_embed", "base_encoder.blocks.0", "predictor")
# Memory of the cards of a dry run, in GiB.
CARDS = (12, 24, 48, 80)
# Policies of a dry run, and the batch at which it counts. Each further batch would take seconds a policy.
POLICIES = (
    PLAIN, "mesa8", "mesa6", "mesa4", "mesa8-recompute", "mesa6-recompute", "mesa4-recompute",
    "checkpoint",
)  # fmt: skip
DRY_RUN_SIZES = (4096,)


class MocoRun(RecipeRun):
    """A model in training.

    Args:
        config: of the run.
        data: images; labels serve the nearest neighbours alone.
        accelerator: Accelerate's, for the processes and the device.
    Raises:
        ConfigError: batch, processes, data and model do not fit together.
    """

    config: Config

    def __init__(self, config: Config, data: Sources, accelerator: Any) -> None:
        super().__init__(config, accelerator, data.train.count)
        train, self.data = config.train, data
        self.model: MoCo = build(config)
        if train.chunk and self.model.trunk_has_batch_norm():
            raise ConfigError(
                f"train.chunk={train.chunk}: {config.model.name} has batch norms in its trunk, and "
                "chunks would change their statistics; set train.chunk=0"
            )
        self.shapes = checkpoints.shapes(self.model)
        self.model.to(self.device)
        if self.world > 1:
            synchronise(self.model, self.device)
        if train.policy != PLAIN:
            mesa_train.wrap(self.model, train.policy)
        self.optimizer = optimizer_of(config, self.model)
        self.transforms = transforms(config.data, config.views)
        self.loader = Loader(
            data,
            self.transforms,
            config.data,
            batch_size=self.batch,
            seed=train.seed,
            steps_per_epoch=self.cadence.epoch,
            rank=self.rank,
            world=self.world,
            pin_memory=config.data.pin_memory and self.device.type == "cuda",
        )
        self.norms = dict[str, Tensor]()

    def epoch_batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Batches (N, 2, 3, H, W) of this process."""
        return self.loader.training(epoch, first)

    def step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step. Returns (loss of this process, gradient norm)."""
        train, optim, epochs = self.config.train, self.config.optim, self.config.train.epochs
        views = next(batches)[0].to(self.device, non_blocking=True)
        epoch = self.steps / self.cadence.epoch
        peak = optim.lr * train.global_batch / 256
        rate = learning_rate(epoch, peak=peak, warmup=optim.warmup_epochs, epochs=epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed_all(train.seed, self.steps, self.accelerator.process_index)
        model = self.config.model
        loss = backward_by_view(
            self.model,
            views[:, 0],
            views[:, 1],
            momentum(epoch, base=model.momentum, epochs=epochs, cosine=model.momentum_cosine),
            chunk=train.chunk or None,
            autocast=self.autocast,
            scale=self.scaler.scale,
        )
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = self._watch()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss, norm

    def row(self) -> dict[str, float]:
        """Gradient norms of the last step by part. Waits for the device."""
        return {f"grad_norm.{name}": float(norm) for name, norm in self.norms.items()}

    def cross_entropy(self, loss: float) -> float:
        """The cross-entropy of a query against all keys, in nats, of a loss of both sides."""
        return loss / (4 * self.config.model.temperature)

    def nearest_neighbours(self, k: int = 20) -> float:
        """Accuracy of nearest neighbours on the validation images, 0 to 1, on this process."""
        count = min(self.data.train.count, self.config.train.knn_images)
        order = torch.randperm(self.data.train.count, generator=torch.Generator().manual_seed(0))
        with keeping_random_state():
            known = self._features(self.data.train, order[:count].tolist())
            test = self._features(self.data.val, list(range(self.data.val.count)))
        guesses = torch.from_numpy(knn(*known, test[0], min(k, count)))
        return (guesses == test[1]).double().mean().item()

    @torch.no_grad()
    def _features(self, records: Any, rows: list[int]) -> tuple[Tensor, Tensor]:
        """(features, labels) of images without augmentation."""
        data, found = self.config.data, []
        samples = Samples(
            records, self.transforms[1], data.image_size, 0, data.on_corrupt, replace=False
        )
        self.model.eval()
        for start in range(0, len(rows), 256):
            batch = [samples[0, i] for i in rows[start : start + 256]]
            kept = [(image, label) for image, label, _ in batch if label >= 0]
            images = torch.stack([image for image, _ in kept]).to(self.device)
            with self.autocast():
                features = self.model.features(self.model.base_encoder, images)
            found.append((features.float().cpu(), torch.tensor([label for _, label in kept])))
        self.model.train()
        return torch.cat([f for f, _ in found]), torch.cat([y for _, y in found])

    def export(self) -> Path:
        """Write the trunk to `encoder.safetensors`, as a timm model without a classifier."""
        head = f"{self.model.classifier}."
        weights = {
            key: value
            for key, value in self.model.base_encoder.state_dict().items()
            if not key.startswith(head)
        }
        path = self.out / "encoder.safetensors"
        if self.main:
            about = {"model": self.config.model.name, "step": str(self.steps)}
            checkpoints.save_weights(path, weights, about)
        return path

    def _watch(self) -> Tensor:
        """The norm of the whole gradient; norms of its parts are kept for the report."""
        total = torch.zeros((), device=self.device)
        parts = {name: torch.zeros((), device=self.device) for name in WATCHED}
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            square = p.grad.float().square().sum()
            total += square
            for part in parts:
                if name.startswith(f"{part}."):
                    parts[part] += square
        self.norms = {name: value.sqrt() for name, value in parts.items()}
        return total.sqrt()


def build(config: Config) -> MoCo:
    """The model of a configuration, with weights from torch's global generator.

    Raises:
        ConfigError: the encoder is unknown or does not take the image size.
    """
    import difflib

    import timm

    import mesa_train.models as registered  # noqa: F401  timm knows them from here on

    model, size = config.model, config.data.image_size
    if not timm.is_model(model.name):
        near = ", ".join(difflib.get_close_matches(model.name, timm.list_models(), n=4))
        raise ConfigError(f"model.name: no model {model.name!r} in timm; close names: {near}")
    options: dict[str, Any] = {"img_size": size}
    if model.name.startswith("moco_vit"):
        options["stop_grad_conv1"] = model.stop_grad_conv1
    try:
        try:
            encoder = timm.create_model(model.name, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            encoder = timm.create_model(model.name)
        made = MoCo(
            encoder,
            dim=model.dim,
            hidden=model.hidden,
            temperature=model.temperature,
            projector_layers=model.projector_layers,
            predictor_norm=model.predictor_norm,
        )
        with torch.no_grad():
            made.features(made.base_encoder.eval(), torch.zeros(1, 3, size, size))
        made.train()
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.name={model.name} at {size} pixels: {reason}") from None
    if model.grad_checkpointing:
        made.base_encoder.set_grad_checkpointing(True)  # type: ignore[operator]
    return made


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration."""
    decay = config.optim.weight_decay
    if config.optim.name == "adamw":
        return adamw(model, lr=0.0, weight_decay=decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    return LARS(trained, lr=0.0, weight_decay=decay)


def describe(run: MocoRun) -> str:
    """One line about a run."""
    train = run.config.train
    chunk = f", trunk in chunks of {train.chunk}" if train.chunk else ""
    return (
        f"{run.config.model.name} at {run.config.data.image_size} px, {train.policy}, "
        f"{run.precision.name}: {train.global_batch} images a step on "
        f"{run.accelerator.num_processes} process(es){chunk}, steps {run.steps} to {run.cadence.steps}"
    )


def plan(config: Config, world: int) -> str:
    """The text of a dry run: steps, the bytes of a step, and the largest batch by policy and card.

    Raises:
        ConfigError: batch, processes, data and model do not fit together.
    """
    from mesa_train.training.data import sources

    train, size = config.train, config.data.image_size
    images = config.data.train_images or sources.load(config.data, None).train.count
    batch, rest = divmod(train.global_batch, world)
    steps = images // train.global_batch
    if rest or not steps:
        raise ConfigError(
            f"train.global_batch={train.global_batch} must be a multiple of {world} processes and "
            f"at most {images}"
        )
    moco = _on_meta(config)
    trained = sum(p.numel() for p in moco.parameters() if p.requires_grad)
    return "\n".join(
        [
            f"{config.model.name} at {size} px, {images} images, {trained:,} trained parameters",
            f"{steps * train.epochs} steps = {train.epochs} epochs of {steps}; {batch} images on each "
            f"of {world} process(es), {_way(config)}",
            choose(train.precision, "cpu" if train.device == "cpu" else _device()).line,
            f"counted under bf16 autocast with {config.optim.name}, 2 GiB of a card left free:",
            *batches_by_policy(config, batch),
        ]
    )


def batches_by_policy(config: Config, batch: int) -> list[str]:
    """A table of the bytes of a step and the largest batch on a card: a line for each policy.

    Args:
        config: of the run; the line of its policy ends with an asterisk.
        batch: images of a process.
    """
    from .memory import GIB, counted, largest_batch

    checkpointed, policy = config.model.grad_checkpointing, config.train.policy
    own = (policy if policy != PLAIN else "checkpoint") if checkpointed else policy
    without = dataclasses.replace(config.model, grad_checkpointing=False)
    plain = dataclasses.replace(config, model=without)
    # (label, method, configuration of the model)
    methods = {name: (name, plain) for name in POLICIES}
    if checkpointed and policy != PLAIN:
        own = f"{policy}, checkpoint"
        methods[own] = (policy, config)
    elif not checkpointed:
        methods.setdefault(own, (own, plain))
    cards = "".join(f"{f'{gib} GB':>9}" for gib in CARDS)
    lines = [f"{'policy':<28}{'an image keeps':>16}{'a step needs':>15}  largest batch:{cards}"]
    way = _way(config)
    for label, (method, built) in methods.items():
        found = counted(
            lambda: _on_meta(built),  # noqa: B023  called at once
            method,
            config.data.image_size,
            chunk=config.train.chunk or 64,
            ways=(way,),
            optimizer=config.optim.name,
            sizes=DRY_RUN_SIZES,
        )
        held, saved = found[way]
        most = "".join(f"{largest_batch(held, gib):>9,}" for gib in CARDS)
        need = f"{held(batch) / GIB:.2f} GiB"
        star = " *" if label == own else ""
        lines.append(f"{label:<28}{format_bytes(saved):>16}{need:>15}{'':16}{most}{star}")
    return lines


def _on_meta(config: Config) -> MoCo:
    """The model of a configuration without memory."""
    with torch.device("meta"):
        return build(config).train()


def _way(config: Config) -> str:
    """One of `memory.WAYS`."""
    return "chunks" if config.train.chunk else "by view"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
