"""The state of a training run and the scores of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.loader import Batch
from mesa_train.training.data.sources import IGNORED


@dataclasses.dataclass
class TrainState:
    """Position of a run.

    Attributes:
        step: optimizer steps done.
        best: best top-1 accuracy, 0 to 1; -1 before the first evaluation.
        loss: sum of the losses in the current epoch.
        losses: number of losses in that sum.
        skipped: images that could not be decoded.
    """

    step: int = 0
    best: float = -1.0
    loss: float = 0.0
    losses: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores on the validation images.

    Attributes:
        loss: mean loss.
        top1: share of correct answers, 0 to 1.
        top5: share of correct answers among the best five, 0 to 1.
        images: number of images.
    """

    loss: float
    top1: float
    top5: float
    images: int


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterator[Batch],
    accelerator: Any,
    tick: Callable[[], None] | None = None,
) -> Scores:
    """Evaluate a model on the batches of every rank. Labels equal to `IGNORED` do not count.

    Raises:
        ConfigError: no validation image can be decoded.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for images, labels, _ in batches:
        labels = labels.to(accelerator.device)
        with accelerator.autocast():
            logits = model(images.to(accelerator.device))
        valid = labels != IGNORED
        logits, labels = logits.float()[valid], labels[valid]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = [loss, ranked[:, 0].sum(), ranked.sum(), valid.sum()]
        sums += torch.stack([c.to(sums.dtype) for c in counts])
        if tick is not None:
            tick()
    model.train(was_training)
    loss, top1, top5, images_seen = accelerator.reduce(sums, reduction="sum").tolist()
    if not images_seen:
        raise ConfigError("there is no validation image that can be decoded")
    return Scores(loss / images_seen, top1 / images_seen, top5 / images_seen, int(images_seen))
