"""Distillation as a training method of the classification recipes: "patient and consistent".

Teacher and student see the same crop, flip and mixup, and the labels of the training images are not
used (arXiv 2106.05237). The loss is T^2 KL(teacher || student).

Mixup mixes the images at the positions 2j and 2j + 1 of an epoch's order, with one share a of the
larger part for each pair: max(a, 1 - a), a from Beta(alpha, alpha). The published code draws one
share for each batch and rolls the batch. With pairs, a mixed image does not depend on the batch size
and the number of processes, so that stored outputs of the teacher serve every student.

The teacher's outputs are computed with the student, or stored (`store.py`): then epoch e repeats
draw e modulo `draws`, and the teacher leaves the device before the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesa_train.training.classification.config import Config
from mesa_train.training.classification.method import Method
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.loader import Batch, Loader
from mesa_train.training.data.sources import keeping_random_state, permutation
from mesa_train.training.evaluation.distillation import (
    distillation_loss,
    sigmoid_distillation_loss,
    teacher_agreement,
    top_distillation_loss,
)
from mesa_train.training.progress import Every
from mesa_train.utils.formatting import format_bytes

from . import teacher as teachers
from .store import PROBE, Store
from .teacher import Teacher

# Training images of the agreement after an epoch, without augmentation.
AGREEMENT_IMAGES = 2048


class Distillation(Method):
    """Student and teacher of a run.

    Args:
        config: of the run.
    """

    mixes = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.distill = config.distill
        self._teacher: Teacher | None = None
        self.store: Store | None = None
        self.known: dict[str, Tensor] = {}

    def check_files(self) -> None:
        """ConfigError if the teacher is missing."""
        teachers.check_files(self.distill)

    def teacher(self, run: Any) -> Teacher:
        """The teacher, loaded once."""
        if self._teacher is None:
            size, device = self.config.data.image_size, run.accelerator.device
            self._teacher = Teacher(self.distill, run.classes, size, device)
        return self._teacher

    def batches(self, run: Any, epoch: int, first: int) -> Iterator[Batch]:
        """Mixed images of an epoch; their targets are stored outputs, or the labels unused."""
        draws = self.distill.draws
        draw = epoch % draws if draws else epoch
        plan, micro, rank = run.plan, self.config.train.micro_batch, run.rank
        if draws and self.store is None:
            self._prepare_store(run)
        starts = (
            (step * plan.accumulation + turn) * plan.world * micro + rank * micro
            for step in range(first, plan.steps_per_epoch)
            for turn in range(plan.accumulation)
        )
        for start, (images, labels, skipped) in zip(
            starts, run.loader.training(draw, first), strict=True
        ):
            mixed = self.mixed(images, draw, start)
            if self.store is not None:
                labels = self.store.read(draw, range(start, start + len(images)))
            yield mixed, labels, skipped

    def mixed(self, images: Tensor, draw: int, start: int) -> Tensor:
        """Images (N, 3, H, W) at the positions from `start`, mixed in pairs."""
        alpha = self.config.augment.mixup
        if not alpha:
            return images
        shares = []
        for pair in range(start // 2, (start + len(images)) // 2):
            stream = np.random.default_rng((self.config.train.seed, draw, pair))
            share = float(stream.beta(alpha, alpha))
            shares.append(max(share, 1 - share))
        a = images.new_tensor(shares).repeat_interleave(2).view(-1, 1, 1, 1)
        # The other image of each pair.
        pairs = images[: 2 * len(shares)]
        other = pairs.view(-1, 2, *images.shape[1:]).flip(1).reshape(pairs.shape)
        return torch.cat([a * pairs + (1 - a) * other, images[2 * len(shares) :]])

    def loss(self, run: Any, images: Tensor, targets: Tensor) -> Tensor:
        """The divergence of a micro-batch."""
        logits = run.model(images).float()
        if self.store is None:
            with run.accelerator.autocast():
                targets = self.teacher(run)(images)
        return self.divergence(logits, targets)

    def divergence(self, logits: Tensor, targets: Tensor) -> Tensor:
        """T^2 KL of the student's logits and the teacher's outputs, as `Store.read` gives them."""
        settings, t = self.distill, self.distill.temperature
        if self.store is not None and self.store.top:
            top = self.store.top
            return top_distillation_loss(logits, targets[:, :top].long(), targets[:, top:], t)
        if settings.loss == "sigmoid":
            return sigmoid_distillation_loss(logits, targets, t)
        return distillation_loss(logits, targets, t)

    def scores(self, run: Any) -> dict[str, float]:
        """Divergence and agreement of student and teacher on images without augmentation.

        Returns:
            val_kl, val_agree1 and val_agree5 (the teacher's first class is the student's first, or
            among its first five), and the same for the first training images.
        """
        found: dict[str, float] = {}
        for name, loader in (("val", run.loader), ("train", self._train_views(run.loader))):
            if loader is not None:
                found |= {f"{name}_{k}": v for k, v in self._agreement(run, name, loader).items()}
        return found

    @torch.no_grad()
    def _agreement(self, run: Any, name: str, loader: Loader) -> dict[str, float]:
        """Means over all images of a loader's validation split, on all processes."""
        model = run.bare
        was_training, device = model.training, run.accelerator.device
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        answers: list[Tensor] = []
        known = self.known.get(name)
        with keeping_random_state():
            for number, (images, labels, _) in enumerate(loader.validation()):
                images, valid = images.to(device), labels.to(device) >= 0
                with run.accelerator.autocast():
                    if known is None:
                        answers.append(self.teacher(run)(images).half())
                    student = model(images).float()
                size = loader.batch_size
                taught = answers[-1] if known is None else known[number * size :][: len(images)]
                s, t = student[valid], taught[valid].float()
                if not len(s):
                    continue
                settings = self.distill
                kl = sigmoid_distillation_loss if settings.loss == "sigmoid" else distillation_loss
                best = min(5, s.shape[1])
                sums += torch.stack([
                    kl(s, t, settings.temperature, reduction="none").sum().double(),
                    teacher_agreement(s, t).sum().double(),
                    teacher_agreement(s, t, best).sum().double(),
                    valid.sum().double(),
                ])  # fmt: skip
        if known is None:
            self.known[name] = torch.cat(answers)
        model.train(was_training)
        kl, one, five, count = run.accelerator.reduce(sums, reduction="sum").tolist()
        count = max(count, 1)
        return {"kl": kl / count, "agree1": one / count, "agree5": five / count}

    def _train_views(self, loader: Loader) -> Loader | None:
        """The first training images as a validation split; None for a stream."""
        train = loader.sources.train
        if train.stream is not None:
            return None
        few = dataclasses.replace(train, count=min(train.count, AGREEMENT_IMAGES))
        return loader.of(dataclasses.replace(loader.sources, val=few))

    def _prepare_store(self, run: Any) -> None:
        """Open the store, label what is missing, and drop the teacher."""
        self.store = self._opened(run)
        for draw in range(min(self.distill.draws, self.config.train.epochs)):
            self._label(run, draw)
        self.scores(run)  # the teacher's answers to unaugmented images are known from here on
        self._teacher = None

    def _label(self, run: Any, draw: int) -> None:
        """Label the missing pieces of a draw. Processes take them in turn."""
        store, accelerator = self.store, run.accelerator
        assert store is not None
        missing = [n for n in range(store.pieces()) if not store.piece(draw, n).is_file()]
        # All processes have the same list before one of them writes.
        accelerator.wait_for_everyone()
        said = Every()
        for place, number in enumerate(missing):
            if place % accelerator.num_processes == accelerator.process_index:
                said(
                    f"the teacher labels draw {draw + 1} of {self.distill.draws}, piece {number + 1}"
                )
                store.write(draw, number, lambda positions: self._outputs(run, draw, positions))
        accelerator.wait_for_everyone()

    def _outputs(self, run: Any, draw: int, positions: range) -> Iterator[Tensor]:
        """The teacher's logits of a range of positions of a draw."""
        start = positions.start
        teacher = self.teacher(run)
        for images in self._views(run, draw, positions):
            with run.accelerator.autocast():
                yield teacher(self.mixed(images, draw, start))
            start += len(images)

    def _views(self, run: Any, draw: int, positions: range) -> Iterator[Tensor]:
        """Augmented images at a range of positions of a draw, batch by batch."""
        order = permutation(run.images, self.config.train.seed, draw)[
            positions.start : positions.stop
        ]
        # Pairs stay in one batch.
        keys = [[(draw, int(i)) for i in part] for part in order.split(max(2, self._batch))]
        for images, _, _ in run.loader.of_keys(keys):
            yield images

    @property
    def _batch(self) -> int:
        return self.config.train.micro_batch // 2 * 2

    def _opened(self, run: Any) -> Store:
        """The store of a run, compared with its settings and pixels."""
        settings, data = self.distill, self.config.data
        if run.loader.sources.train.stream is not None:
            raise ConfigError(
                "distill.draws: a stream has no fixed order; set data.streaming=false"
            )
        store = Store(
            Path(settings.store or run.out / "teacher"),
            {
                "teacher": teachers.key_of(settings, data.image_size),
                "temperature": settings.temperature if settings.top else None,
                "top": settings.top,
                "classes": run.classes,
                "images": run.images,
                "seed": self.config.train.seed,
                "data": [data.source, data.path, data.train_split, data.image_size],
                "augment": dataclasses.asdict(self.config.augment),
            },
            run.images,
            run.classes,
            settings.top,
            settings.temperature,
        )
        first = next(self._views(run, 0, range(min(PROBE, run.images // 2 * 2))))
        store.check(self.mixed(first, 0, 0)[:PROBE], run.accelerator.is_main_process)
        run.accelerator.wait_for_everyone()
        return store

    def plan(self, classes: int, images: int) -> list[str]:
        """Lines of a dry run: the teacher's size, and that of its stored outputs."""
        settings = self.distill
        count, size = teachers.parameters(settings, classes)
        lines = [
            f"teacher {settings.teacher}: {count:,} parameters, {format_bytes(size)} at "
            f"{settings.bits} bits, not in the sum below"
        ]
        if settings.draws:
            each = Store.bytes_of(images, classes, settings.top)
            lines.append(
                f"stored outputs: {settings.draws} draws of {format_bytes(each)}, together "
                f"{format_bytes(settings.draws * each)}; the teacher runs "
                f"{settings.draws * images:,} forwards once, before the first step"
            )
        else:
            lines.append("the teacher runs one forward in each step of the student")
        return lines
