"""A run of a decoder: segmentation or depth on the maps of a frozen or trained backbone.

Evaluation resizes the short side of a picture to the window, averages the outputs of overlapping
windows, and resizes the mean to the picture. Scores are over all pixels of the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.models.moco.batch_norm import synchronise
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.sources import keeping_random_state, train_order
from mesa_train.training.evaluation import depth as depth_metrics
from mesa_train.training.evaluation.segmentation import (
    confusion_matrix,
    segmentation_scores,
    sliding_window_logits,
)
from mesa_train.training.evaluation.suite.frozen import FrozenModel, configured_model
from mesa_train.training.recipe_run import RecipeRun, decayed
from mesa_train.utils.formatting import format_bytes

from . import data
from .config import Config
from .data import Pictures
from .decoders import DPT, DenseModel, LinearDepth, LinearSegmentation, UperNet, resized
from .features import FeatureMaps

# Metres below which a predicted depth is no depth.
LEAST_DEPTH = 1e-3
# Training pictures whose depths make the answers that look at no pixel, and their bands of rows.
KNOWN, BANDS = 64, 16


class DecoderRun(RecipeRun):
    """A decoder in training.

    Args:
        config: of the run.
        accelerator: Accelerate's.
        train: training pictures.
        held_out: held-out pictures.
    Raises:
        ConfigError: batch, processes, data and model do not fit together.
    """

    model: DenseModel

    def __init__(
        self, config: Config, accelerator: Any, train: Pictures, held_out: Pictures
    ) -> None:
        super().__init__(config, accelerator, train.count * config.data.repeats)
        if config.model.decoder == "upernet" and self.batch < 2:
            raise ConfigError(
                f"train.global_batch={config.train.global_batch}: UperNet has batch norms of pooled "
                "maps and needs at least 2 crops in each process"
            )
        self.train_pictures, self.held_out = train, held_out
        self.depth = config.data.task == "depth"
        self.net = backbone(config)
        torch.manual_seed(config.train.seed)
        self.model = build(config, self.net, len(train.names))
        self.shapes = checkpoints.shapes(self.model)
        self.model.to(self.device)
        if self.world > 1:
            synchronise(self.model.decoder, self.device)
        if config.train.policy != PLAIN:
            mesa_train.wrap(self.model, config.train.policy)
        self.optimizer = optimizer(self.model, config)
        self.crops = data.Crops(train, config.data, self.net.mean, self.net.std, config.train.seed)

    def epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (N, C, S, S), maps (N, S, S)) of this process."""
        keys = train_order(
            self.images, seed=self.config.train.seed, epoch=epoch, first=first, rank=self.rank,
            world=self.world, micro=self.batch, accum=1,
        )  # fmt: skip
        loader: Any = DataLoader(
            self.crops,
            batch_sampler=list(keys),
            collate_fn=data.collate,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of labelled pixels, or the loss of valid depths."""
        images, labels = (x.to(self.device, non_blocking=True) for x in batch)
        output, further = self._both(images)
        share = self._share((labels > 0) if self.depth else (labels != data.IGNORED))
        if not share:
            return output.sum() * 0 + (0.0 if further is None else further.sum() * 0)
        if self.depth:
            return share * self._depth_loss(output[:, 0], labels)
        loss = F.cross_entropy(output, labels.long(), ignore_index=data.IGNORED)
        if further is not None:
            second = F.cross_entropy(further, labels.long(), ignore_index=data.IGNORED)
            loss = loss + self.config.model.aux_weight * second
        return share * loss

    def _share(self, counted: Tensor) -> float:
        """The pixels of this process that count, divided by their mean over processes.

        The loss is a mean over a process's pixels. Times this share, the mean over processes is the
        mean over the pixels of all processes.
        """
        own = int(counted.sum())
        if self.world == 1:
            return float(own > 0)
        total = self.accelerator.reduce(
            torch.tensor(float(own), device=self.device), reduction="sum"
        )
        return own * self.world / max(1.0, float(total))

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps."""
        optim = self.config.optim
        warm = optim.warmup_epochs * self.cadence.epoch
        if optim.schedule == "cosine" or step < warm:
            return super().rate(step)
        left = 1 - (step - warm) / max(1.0, self.cadence.steps - warm)
        return float(optim.lr * (0.01 + 0.99 * left**0.9))

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs of both heads. UperNet's second head is part of the forward in training."""
        if isinstance(self.model.decoder, UperNet) and self.model.decoder.auxiliary is not None:
            return self.model(images, second=True)
        return self.model(images), None

    def _depth_loss(self, z: Tensor, depth: Tensor) -> Tensor:
        """The configured loss of z = log(1 + metres)."""
        metres = metres_of(z)
        kind = self.config.loss.depth
        if kind == "scale_invariant":
            return depth_metrics.scale_invariant_log(metres, depth)
        if kind == "dinov2":
            return depth_metrics.dinov2_depth_loss(metres, depth)
        return depth_metrics.log1p_mse(metres, depth)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Logits (classes, H, W), or metres (H, W), of a picture uint8 (3, H, W)."""
        side, height, width = self.config.data.image_size, *image.shape[1:]
        short = min(height, width)
        size = [max(side, round(v * side / short)) for v in (height, width)]
        pixels = data.normalised(image, self.crops.mean, self.crops.std)[None]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)

        def model(window: Tensor) -> Tensor:
            with self.autocast():
                output: Tensor = self.model(window)
            return metres_of(output) if self.depth else output

        stride = self.config.data.window_stride
        found = sliding_window_logits(model, pixels[0].to(self.device), side, stride)
        whole = resized(found[None], (height, width))[0].cpu()
        return whole[0] if self.depth else whole

    def evaluate(self) -> dict[str, float]:
        """Mean IoU and accuracies, or the depth metrics, over all held-out pixels."""
        self.model.eval()
        with keeping_random_state():
            scores = self._depth_scores() if self.depth else self._class_scores()
        self.model.train()
        return scores

    def _class_scores(self) -> dict[str, float]:
        classes = len(self.held_out.names)
        total = torch.zeros(classes, classes, dtype=torch.float64, device=self.device)
        for i in range(self.rank, self.held_out.count, self.world):
            image, label = self.held_out.read(i)
            guess = self.predict(image).argmax(0)
            found = confusion_matrix(guess.numpy(), label.numpy(), classes, data.IGNORED)
            total += torch.from_numpy(found).to(total)
        summed = self.accelerator.reduce(total, reduction="sum").cpu().numpy()
        if not summed.sum():
            raise ConfigError("no held-out pixel has a label")
        scores = segmentation_scores(summed)
        self.iou = dict(zip(self.held_out.names, scores.iou.tolist(), strict=True))
        # One answer for all pixels: the commonest class has its share as IoU, the others have 0.
        labelled = summed.sum(1)
        return {
            "mean_iou": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "mean_iou_of_commonest": float(labelled.max() / labelled.sum() / (labelled > 0).sum()),
        }

    def _depth_scores(self) -> dict[str, float]:
        """Every process scores all pictures: the metrics are of all pixels together."""
        found = []
        for i in range(self.held_out.count):
            image, depth = self.held_out.read(i)
            valid = depth > 0
            guess = self.predict(image).clamp_min(LEAST_DEPTH)
            found.append((guess[valid].numpy(), depth[valid].numpy(), bands_of(depth).numpy()))
        guesses, truth, bands = (np.concatenate(part) for part in zip(*found, strict=True))
        if not truth.size:
            raise ConfigError("no held-out pixel has a depth")
        scores = depth_metrics.depth_metrics(guesses, truth)
        d = np.log(guesses) - np.log(truth)
        scores["scale_invariant_log"] = float(d.var())
        for name, medians in self._medians().items():
            answer = np.asarray(medians)[bands if len(medians) > 1 else np.zeros_like(bands)]
            scores[f"abs_rel_of_{name}"] = float((np.abs(answer - truth) / truth).mean())
        return scores

    def _medians(self) -> dict[str, list[float]]:
        """Median training depths: of all pixels, and of the pixels in each band of rows.

        A decoder must be better than both, which look at no picture.
        """
        depths, bands = [], []
        for i in range(min(self.train_pictures.count, KNOWN)):
            depth = self.train_pictures.read(i)[1]
            depths.append(depth[depth > 0])
            bands.append(bands_of(depth))
        values, rows = torch.cat(depths), torch.cat(bands)
        whole = values.median().item()
        by_band = [values[rows == band] for band in range(BANDS)]
        return {
            "median": [whole],
            "rows": [part.median().item() if len(part) else whole for part in by_band],
        }

    def export(self) -> Path:
        """Write backbone and decoder to `model.safetensors`."""
        path = self.out / "model.safetensors"
        if self.main:
            about = {"model": self.config.model.name, "decoder": self.config.model.decoder}
            checkpoints.save_weights(path, self.model.state_dict(), about)
        return path


def optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW or SGD of the trained parameters; biases, norms and scalars do not decay."""
    groups, optim = decayed(model.parameters(), config.optim.weight_decay), config.optim
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=0.0)


def bands_of(depth: Tensor) -> Tensor:
    """The band, 0 at the top to BANDS - 1, of each valid pixel of a depth map (H, W)."""
    rows = torch.arange(len(depth)) * BANDS // len(depth)
    return rows[:, None].expand_as(depth)[depth > 0]


def metres_of(z: Tensor) -> Tensor:
    """Metres of z = log(1 + metres)."""
    return z.float().expm1().clamp_min(LEAST_DEPTH)


def backbone(config: Config) -> FrozenModel:
    """The backbone on the CPU. ConfigError names the setting that is wrong."""
    model = config.model
    hub = "/" in model.name or (Path(model.name) / "config.json").is_file()
    size = None if hub else config.data.image_size
    return configured_model(model.name, model.weights, size, "cpu")


def build(config: Config, net: FrozenModel, classes: int) -> DenseModel:
    """Backbone and decoder. ConfigError if the backbone's maps do not fit the decoder."""
    model, size = config.model, config.data.image_size
    several = model.decoder in ("upernet", "dpt")
    maps = FeatureMaps(net, 4 if several else 1)
    if size % maps.patch:
        below = size // maps.patch * maps.patch
        raise ConfigError(
            f"data.image_size={size} must be a multiple of the patch of {model.name}, "
            f"{maps.patch} pixels; take {below or maps.patch} or {below + maps.patch}"
        )
    decoder: nn.Module
    if model.decoder == "upernet":
        decoder = UperNet(maps.channels, classes, model.channels or 512, model.aux_weight > 0)
    elif model.decoder == "dpt":
        if len(set(maps.channels)) > 1:
            raise ConfigError(
                f"model.decoder=dpt needs maps of one width, {model.name} has {maps.channels}; "
                "take linear"
            )
        decoder = DPT(maps.channels, model.channels or 64)
    elif config.data.task == "depth":
        decoder = LinearDepth(maps.channels)
    else:
        decoder = LinearSegmentation(maps.channels, classes)
    return DenseModel(maps, decoder, model.frozen)


def prepare(config: Config, accelerator: Any) -> DecoderRun:
    """Build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together.
    """
    with accelerator.main_process_first():
        train, held_out = data.load(config.data)
    return DecoderRun(config, accelerator, train, held_out)


def describe(run: DecoderRun) -> str:
    """One line about a run."""
    config, model = run.config, run.config.model
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return (
        f"{model.name} ({'frozen' if model.frozen else 'trained'}) with the decoder {model.decoder} "
        f"for {config.data.task} at {config.data.image_size} px, {config.train.policy}, "
        f"{run.precision.name}: {trained:,} trained parameters, {config.train.global_batch} crops "
        f"of {run.train_pictures.count} pictures a step on {run.world} process(es), steps "
        f"{run.steps} to {run.cadence.steps}"
    )


def plan(config: Config, processes: int) -> str:
    """The text of a dry run: sizes, steps, and bytes kept for the backward of a step."""
    count, held_out, names = data.sizes(config.data)
    images = count * config.data.repeats
    batch, rest = divmod(config.train.global_batch, processes)
    if rest or images < config.train.global_batch:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} must be a multiple of {processes} "
            f"processes and at most {images}"
        )
    net = backbone(config)
    model = build(config, net, len(names)).train()
    side, steps = config.data.image_size, images // config.train.global_batch
    policy: Any = PLAIN if config.train.policy == "plain" else config.train.policy
    kept = mesa_train.footprint(
        model, torch.zeros(batch, net.channels, side, side), policy=policy,
        loss=lambda output: output.float().square().mean(),
    )  # fmt: skip
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.maps, model.decoder)]
    return "\n".join([
        f"{count} training and {held_out} held-out pictures, "
        f"{len(names) or 'no'} classes",
        f"{steps * config.train.epochs} steps = {config.train.epochs} epochs of {steps}; {batch} "
        f"crops of {side} px on each of {processes} process(es)",
        f"backbone {config.model.name}: {counts[0]:,} parameters, "
        f"{'frozen' if config.model.frozen else 'trained'}, {len(model.maps.channels)} maps of a "
        f"grid of {model.maps.grid[0]}x{model.maps.grid[1]}",
        f"decoder {config.model.decoder}: {counts[1]:,} parameters",
        f"a step keeps {format_bytes(kept.saved_bytes)} under {config.train.policy}",
    ])  # fmt: skip
