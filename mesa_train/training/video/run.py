"""A run of the video probe: a transformer over the cached features of a clip's frames.

Features of all frames are computed once by the frozen image model. The probe has a class token,
learned positions of the frames and pre-norm layers. It standardises features by their mean and
deviation on the training clips, because features of large models differ in scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.sources import train_order
from mesa_train.training.evaluation.suite.frozen import FrozenModel, configured_model
from mesa_train.training.evaluation.suite.images import FeatureCache
from mesa_train.training.recipe_run import RecipeRun, decayed
from mesa_train.utils.formatting import format_bytes

from . import clips as data
from .clips import Clips
from .config import Config, ProbeConfig

FEATURE_BATCH = 64


class TemporalProbe(nn.Module):
    """Features of frames (B, T, D) to logits (B, classes).

    Args:
        features: width D of a frame's features.
        frames: T.
        classes: number of classes.
        config: the section `probe`.
    """

    def __init__(self, features: int, frames: int, classes: int, config: ProbeConfig) -> None:
        super().__init__()
        width = config.width or features
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.layers: nn.Module | None = None
        if config.layers:
            self.proj = nn.Linear(features, width)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.randn(1, frames, width) * 0.02)
            layer = nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, config.dropout, "gelu", batch_first=True,
                norm_first=True,
            )  # fmt: skip
            self.layers = nn.TransformerEncoder(
                layer, config.layers, nn.LayerNorm(width), enable_nested_tensor=False
            )
        self.head = nn.Linear(width if config.layers else features, classes)

    def standardise(self, known: Tensor) -> None:
        """Take mean and deviation from training features (N, T, D)."""
        flat = known.flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        self.deviation.copy_(flat.std(0, correction=0).clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.deviation
        if self.layers is None:
            pooled = x.mean(1)
        else:
            x = self.proj(x) + self.positions
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            pooled = self.layers(x)[:, 0]
        logits: Tensor = self.head(pooled)
        return logits


class VideoRun(RecipeRun):
    """A probe in training.

    Args:
        config: of the run.
        accelerator: Accelerate's.
        train: training clips.
        held_out: held-out clips.
    """

    model: TemporalProbe

    def __init__(self, config: Config, accelerator: Any, train: Clips, held_out: Clips) -> None:
        super().__init__(config, accelerator, len(train))
        self.train_clips, self.held_out = train, held_out
        net = frame_model(config, str(self.device))
        cache = FeatureCache(
            net, Path(config.train.out) / "features", accelerator, FEATURE_BATCH, half=False
        )
        self.features, self.test = (self._of_clips(cache, clips) for clips in (train, held_out))
        torch.manual_seed(config.train.seed)
        self.model = build(config, self.features.shape[2], len(train.classes))
        self.model.standardise(self.features)
        self.shapes = checkpoints.shapes(self.model)
        self.model.to(self.device)
        if config.train.policy != PLAIN:
            mesa_train.wrap(self.model, config.train.policy)
        groups = decayed(self.model.parameters(), config.optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    def _of_clips(self, cache: FeatureCache, clips: Clips) -> Tensor:
        """Features (clips, T, D)."""
        found = cache(clips.frames)
        return found.view(len(clips), self.config.data.frames, -1)

    def epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features (N, T, D), labels) of this process."""
        order = train_order(
            self.images, seed=self.config.train.seed, epoch=epoch, first=first, rank=self.rank,
            world=self.world, micro=self.batch, accum=1,
        )  # fmt: skip
        for batch in order:
            index = [i for _, i in batch]
            yield self.features[index], self.train_clips.labels[index]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the clips."""
        x, labels = (part.to(self.device) for part in batch)
        return F.cross_entropy(self.model(x).float(), labels)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Top-1 and top-5 of the held-out clips."""
        self.model.eval()
        with self.autocast():
            logits = [self.model(x.to(self.device)).float().cpu() for x in self.test.split(256)]
        self.model.train()
        best = torch.cat(logits).topk(min(5, len(self.held_out.classes)), 1).indices
        hits = best == self.held_out.labels[:, None]
        return {
            "top1": hits[:, 0].double().mean().item(),
            "top5": hits.any(1).double().mean().item(),
        }

    def export(self) -> Path:
        """Write the probe to `probe.safetensors`."""
        path = self.out / "probe.safetensors"
        if self.main:
            about = {"model": self.config.model.name, "classes": ",".join(self.train_clips.classes)}
            checkpoints.save_weights(path, self.model.state_dict(), about)
        return path


def build(config: Config, features: int, classes: int) -> TemporalProbe:
    """The probe. ConfigError if the heads do not divide its width."""
    width, probe = config.probe.width or features, config.probe
    if probe.layers and width % probe.heads:
        raise ConfigError(f"probe.heads={probe.heads} must divide the probe's width of {width}")
    return TemporalProbe(features, config.data.frames, classes, probe)


def frame_model(config: Config, device: str) -> FrozenModel:
    """The frozen image model. ConfigError names the setting that is wrong."""
    model = config.model
    return configured_model(model.name, model.weights, model.image_size, device)


def prepare(config: Config, accelerator: Any) -> VideoRun:
    """Build a run; the features of all frames are computed or read.

    Raises:
        ConfigError: parts of the configuration do not fit together.
    """
    with accelerator.main_process_first():
        train, held_out = data.load(config.data)
    return VideoRun(config, accelerator, train, held_out)


def describe(run: VideoRun) -> str:
    """One line about a run."""
    config = run.config
    return (
        f"{config.model.name} on {config.data.frames} frames, a probe of {config.probe.layers} "
        f"layers, {config.train.policy}, {run.precision.name}: {config.train.global_batch} of "
        f"{run.images} clips a step on {run.world} process(es), steps {run.steps} to "
        f"{run.cadence.steps}"
    )


def plan(config: Config, processes: int) -> str:
    """The text of a dry run."""
    train, held_out = data.load(config.data)
    batch, rest = divmod(config.train.global_batch, processes)
    if rest or len(train) < config.train.global_batch:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} must be a multiple of {processes} "
            f"processes and at most {len(train)}"
        )
    net = frame_model(config, "cpu")
    width = int(net.features(torch.zeros(1, net.channels, net.size, net.size)).shape[1])
    probe = build(config, width, len(train.classes)).train()
    steps, frames = len(train) // config.train.global_batch, config.data.frames
    policy: Any = PLAIN if config.train.policy == "plain" else config.train.policy
    kept = mesa_train.footprint(probe, torch.zeros(batch, frames, width), policy=policy)
    count = sum(p.numel() for p in probe.parameters())
    images = (len(train) + len(held_out)) * frames
    return "\n".join([
        f"{len(train)} training and {len(held_out)} held-out clips of {frames} frames, "
        f"{len(train.classes)} classes",
        f"{steps * config.train.epochs} steps = {config.train.epochs} epochs of {steps}; {batch} "
        f"clips on each of {processes} process(es)",
        f"image model {config.model.name} at {net.size} px, frozen: {images:,} frames once, cached "
        f"features {format_bytes(4 * width * images)}",
        f"probe: {count:,} parameters; a step keeps {format_bytes(kept.saved_bytes)} under "
        f"{config.train.policy}",
    ])  # fmt: skip
