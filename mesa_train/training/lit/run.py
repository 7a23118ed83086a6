"""A run of LiT: the text tower learns to name what a frozen image tower sees.

Locked: the embeddings of all images are computed once, and a step needs no image. Unlocked: the
image tower trains too, under mesa_train's policy, on images in every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.sources import keeping_random_state, seed_cpu, train_order
from mesa_train.training.evaluation.suite.frozen import FrozenModel, configured_model
from mesa_train.training.evaluation.suite.images import FeatureCache
from mesa_train.training.evaluation.text_alignment import canonicalize, prompt_average
from mesa_train.training.recipe_run import RecipeRun, decayed
from mesa_train.utils.formatting import format_bytes

from . import pairs as data
from .config import PROMPTS, Config
from .pairs import Pairs, ZeroShotSet
from .towers import TwoTowers, prompts_of, text_tower, tokenizer, unit

FEATURE_BATCH = 64


class LitRun(RecipeRun):
    """Two towers in training.

    Args:
        config: of the run.
        accelerator: Accelerate's.
        pairs: training images with captions.
        sets: labelled images of the evaluation.
    Raises:
        ConfigError: batch, processes, data and model do not fit together.
    """

    model: TwoTowers

    def __init__(
        self, config: Config, accelerator: Any, pairs: Pairs, sets: list[ZeroShotSet]
    ) -> None:
        super().__init__(config, accelerator, len(pairs))
        self.pairs, self.sets = pairs, sets
        self.net = image_tower(config, str(self.device))
        self.tokens = tokenizer(config.text.context)
        width = self._width()
        torch.manual_seed(config.train.seed)
        image = None if config.model.locked else self.net.model.requires_grad_(True)
        text = text_tower(config.text, width)
        self.model = TwoTowers(text, image, config.loss, self.net.trained_features)
        self.shapes = checkpoints.shapes(self.model)
        self.model.to(self.device)
        if config.train.policy != PLAIN:
            mesa_train.wrap(self.model, config.train.policy)
        self.optimizer = torch.optim.AdamW(
            decayed(self.model.parameters(), config.optim.weight_decay), lr=0.0, betas=(0.9, 0.999)
        )
        self.cache = FeatureCache(
            self.net, Path(config.train.out) / "features", accelerator, FEATURE_BATCH, half=False
        )
        self.known: Tensor | None = None
        self.tested: dict[str, Tensor] = {}

    def _width(self) -> int:
        """Width of an image embedding."""
        net = self.net
        blank = torch.zeros(1, net.channels, net.size, net.size, device=self.device)
        return int(net.features(blank).shape[1])

    @property
    def locked(self) -> bool:
        """True if the image tower is frozen."""
        return bool(self.config.model.locked)

    def epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(embeddings, or pixels if unlocked; token numbers) of this process."""
        seed = self.config.train.seed
        if self.locked and self.known is None:
            self.known = unit(self.cache(self.pairs.images))
        order = train_order(
            self.images, seed=seed, epoch=epoch, first=first, rank=self.rank, world=self.world,
            micro=self.batch, accum=1,
        )  # fmt: skip
        keys = list(order)
        views = self._pixels(keys)
        for batch in keys:
            index = [i for _, i in batch]
            captions = [self.pairs.caption(i, seed, epoch) for i in index]
            images = next(views) if self.known is None else self.known[index]
            yield images, self.tokens(captions)

    def _pixels(self, keys: list[list[tuple[int, int]]]) -> Iterator[Tensor]:
        """Augmented pixels of the batches of an unlocked image tower."""
        if self.locked:
            return
        views = Views(self.pairs, self.net, self.config)
        workers = self.config.data.workers
        loader: Any = DataLoader(
            views, batch_sampler=keys, num_workers=workers, collate_fn=_collate
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The contrastive loss of this process's pairs."""
        images, tokens = (x.to(self.device, non_blocking=True) for x in batch)
        loss: Tensor = self.model(images, tokens)
        return loss

    def row(self) -> dict[str, float]:
        """The learned temperature."""
        return {"temperature": float(self.model.log_temperature.detach().exp())}

    def evaluate(self) -> dict[str, float]:
        """Top-1 and top-5 of the first set by CLIP's 80 prompts and the bare name."""
        if not self.sets:
            return {}
        found = self.score(self.sets[0], "clip_paper")
        return {"top1": found[0], "top5": found[1]}

    @torch.no_grad()
    def score(self, images: ZeroShotSet, prompts: str) -> tuple[float, float]:
        """(top-1, top-5) accuracy, 0 to 1, of a set by a prompt set."""
        self.model.eval()
        with keeping_random_state():
            features = self._features(images)
            classes = self.classes(images.names, prompts).cpu()
        self.model.train()
        best = (features @ classes.T).topk(min(5, len(images.names)), 1).indices
        hits = images.hits(best)
        return hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()

    def _features(self, images: ZeroShotSet) -> Tensor:
        """Embeddings (N, width) of a set; kept if the image tower is locked."""
        if images.name in self.tested:
            return self.tested[images.name]
        short_side = images.short_side(self.net.size)
        if self.locked:
            self.tested[images.name] = unit(self.cache(images.images, short_side))
            return self.tested[images.name]
        found = []
        for start in range(0, len(images.images), FEATURE_BATCH):
            rows = range(start, min(start + FEATURE_BATCH, len(images.images)))
            pixels = [
                self.net.pixels(images.images.read(i), images.images.squash, short_side)
                for i in rows
            ]
            with self.autocast():
                part = self.net.features(torch.stack(pixels).to(self.device))
            found.append(unit(part).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def classes(self, names: tuple[str, ...], prompts: str) -> Tensor:
        """Class embeddings (classes, width): the mean of each class's prompts."""
        templates = prompts_of(prompts)
        texts = [template.replace("{}", name) for name in names for template in templates]
        # Prompts that differ in punctuation alone are the same text.
        unique = list(dict.fromkeys(canonicalize(text) for text in texts))
        with self.autocast():
            parts = [
                self.model.texts(self.tokens(unique[i : i + 256]).to(self.device))
                for i in range(0, len(unique), 256)
            ]
        place = {text: i for i, text in enumerate(unique)}
        rows = torch.cat(parts)[[place[canonicalize(text)] for text in texts]]
        labels = torch.arange(len(names)).repeat_interleave(len(templates))
        return prompt_average(rows, labels)

    def table(self) -> list[dict[str, Any]]:
        """Accuracy of every set by every prompt set."""
        rows = []
        for images in self.sets:
            for prompts in PROMPTS:
                top1, top5 = self.score(images, prompts)
                row = {"set": images.name, "images": len(images), "prompts": prompts}
                rows.append(row | {"classes": len(images.names), "top1": top1, "top5": top5})
        return rows

    def export(self) -> Path:
        """Write `towers.safetensors`, and the zero-shot table to `zeroshot.json`."""
        rows = self.table()
        path = self.out / "towers.safetensors"
        if self.main:
            about = {"image": self.config.model.name, "step": str(self.steps)}
            checkpoints.save_weights(path, self.model.state_dict(), about)
            if rows:
                (self.out / "zeroshot.json").write_text(json.dumps(rows, indent=1))
                print(text_table(rows), flush=True)  # noqa: T201
        return path


class Views(Dataset[Tensor]):
    """Augmented pixels by (epoch, index); a pixel depends on (seed, epoch, index) alone."""

    def __init__(self, pairs: Pairs, net: FrozenModel, config: Config) -> None:
        self.pairs, self.config = pairs, config
        self.pixels, self.squash = net.pixels, pairs.images.squash

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Tensor | Exception]:
        """The pixels of a batch; an error of an image is returned, and the run raises it."""
        try:
            return [self[key] for key in keys]
        except ConfigError as error:
            return [error]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, index = key
        image = self.pairs.images.read(index)
        with keeping_random_state():
            seed_cpu(self.config.train.seed, epoch, index)
            image = data.crop(image, self.config.data.crop_min)
            return self.pixels(image, self.squash)


def _collate(samples: list[Any]) -> Tensor | Exception:
    error = next((s for s in samples if isinstance(s, Exception)), None)
    return error if error is not None else torch.stack(samples)


def image_tower(config: Config, device: str) -> FrozenModel:
    """The image tower. ConfigError names the setting that is wrong."""
    model = config.model
    return configured_model(model.name, model.weights, model.image_size, device)


def text_table(rows: list[dict[str, Any]]) -> str:
    """The zero-shot table as text: a line for each set and prompt set."""
    lines = [f"{'set':<24}{'prompts':<12}{'images':>8}{'classes':>9}{'top-1':>9}{'top-5':>9}"]
    for row in rows:
        lines.append(
            f"{row['set'][-23:]:<24}{row['prompts']:<12}{row['images']:>8}{row['classes']:>9}"
            f"{row['top1']:>9.1%}{row['top5']:>9.1%}"
        )
    return "\n".join(lines)


def prepare(config: Config, accelerator: Any) -> LitRun:
    """Build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together.
    """
    with accelerator.main_process_first():
        pairs, sets = data.load(config.data)
    return LitRun(config, accelerator, pairs, sets)


def describe(run: LitRun) -> str:
    """One line about a run."""
    config = run.config
    how = "locked" if run.locked else "trained"
    return (
        f"{config.model.name} ({how}), text tower of {config.text.layers} layers of "
        f"{config.text.width}, {config.loss.name} loss, {config.train.policy}, "
        f"{run.precision.name}: {config.train.global_batch} pairs of {len(run.pairs)} a step on "
        f"{run.world} process(es), steps {run.steps} to {run.cadence.steps}"
    )


def plan(config: Config, processes: int) -> str:
    """The text of a dry run: sizes, steps, and bytes kept for the backward of a step."""
    pairs, sets = data.load(config.data)
    batch, rest = divmod(config.train.global_batch, processes)
    if rest or not len(pairs) // config.train.global_batch:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} must be a multiple of {processes} "
            f"processes and at most {len(pairs)}"
        )
    net = image_tower(config, "cpu")
    blank = torch.zeros(1, net.channels, net.size, net.size)
    width = int(net.features(blank).shape[1])
    steps = len(pairs) // config.train.global_batch
    with torch.device("meta"):
        text = text_tower(config.text, width)
        tokens = torch.zeros(batch, config.text.context, dtype=torch.long)
    kept = mesa_train.footprint(text, tokens, policy=_policy(config), loss=_total)
    counts = [sum(p.numel() for p in m.parameters()) for m in (net.model, text)]
    lines = [
        f"{len(pairs)} pairs, {len(sets)} sets of the evaluation",
        f"{steps * config.train.epochs} steps = {config.train.epochs} epochs of {steps}; {batch} "
        f"pairs on each of {processes} process(es)",
        f"image tower {config.model.name} at {net.size} px: {counts[0]:,} parameters, "
        f"{'frozen' if config.model.locked else 'trained'}, embeddings of {width}",
        f"text tower: {counts[1]:,} parameters; a step keeps {format_bytes(kept.saved_bytes)} of it "
        f"under {config.train.policy}",
    ]
    if config.model.locked:
        lines.append(f"cached embeddings: {format_bytes(4 * width * len(pairs))}")
    else:
        image = torch.zeros(batch, net.channels, net.size, net.size)
        tower: nn.Module = net.model.requires_grad_(True)
        of_image = mesa_train.footprint(tower, image, policy=_policy(config), loss=_total)
        lines.append(f"image tower: a step keeps {format_bytes(of_image.saved_bytes)}")
    return "\n".join(lines)


def _policy(config: Config) -> Any:
    return PLAIN if config.train.policy == "plain" else config.train.policy


def _total(output: Any) -> Tensor:
    """A loss that reads every output."""
    found = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    return found.float().square().sum()
