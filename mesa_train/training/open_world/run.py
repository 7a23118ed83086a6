"""A run of open-world detection over all tasks: steps, fits of energies, evaluations, checkpoints.

The pictures of a step depend on (seed, stage, epoch) only, and its random choices on (seed, step,
micro-batch). Features enter the queues after a step, and batch norm statistics are those of all
processes. Two processes therefore have the losses and evaluations of one with accumulation. A
checkpoint holds all other state, queues and prototypes included, so a run that was killed continues
exactly. Gradients are averaged over processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.models.open_world import (
    OpenWorldRCNN,
    OpenWorldResult,
    fit_energies,
    open_world_evaluation,
)
from mesa_train.training import checkpoints
from mesa_train.training.accelerated_run import WEIGHTS, AcceleratedRun, add_parts
from mesa_train.training.classification.accelerated import gather
from mesa_train.training.data.sources import keeping_random_state, seed_all
from mesa_train.training.dense import transforms
from mesa_train.training.dense.annotations import DetectionSet
from mesa_train.training.dense.build import start_from
from mesa_train.training.dense.config import AugmentConfig
from mesa_train.training.dense.loader import Batch, DetectionSamples, Loader
from mesa_train.training.loop import Cadence

from .build import build, optimizer_of
from .config import Config, Stage, stages_of
from .data import OpenWorldData
from .statistics import RunningStatistics

_log = logging.getLogger(__name__)


class OpenWorldRun(AcceleratedRun):
    """A detector in training.

    Args:
        config: of the run.
        data: pictures of all tasks.
        accelerator: Accelerate's, for the processes and the device.
    Raises:
        ConfigError: data and model do not fit together.
    """

    config: Config
    model: OpenWorldRCNN
    # They decide the steps of a run.
    fixed: ClassVar = {
        "train": ("global_batch", "micro_batch", "seed"),
        "optim": ("steps", "finetune_steps", "milestones"),
        "data": ("tasks",),
    }
    remedy = "a lower optim.lr, or optim.clip,"

    def __init__(self, config: Config, data: OpenWorldData, accelerator: Any) -> None:
        super().__init__(config, accelerator, sum(map(len, data.training.values())))
        train = config.train
        self.data = data
        self.accumulation = train.global_batch // (train.micro_batch * self.world)
        self.stages = stages_of(config.optim, len(data.tasks.classes))
        torch.manual_seed(train.seed)
        self.model = build(config, len(data.tasks.names))
        if config.model.weights:
            options = {"weights": config.model.weights, "allow_config": False}
            options |= {"conventions": "reference"}
            start_from(self.model, SimpleNamespace(model=SimpleNamespace(**options)))  # type: ignore[arg-type]
        self.shapes = checkpoints.shapes(self.model)
        self.statistics = RunningStatistics(self.model, self.world)
        self.model.to(self.device)
        if train.policy != PLAIN:
            mesa_train.wrap(self.model, train.policy)
        self.optimizer = optimizer_of(config, self.model)
        self.parts = dict[str, Tensor]()
        self.stage = self.stages[0]
        self.cadence = Cadence(self.stages[-1].last, self.stages[-1].last)

    def enter(self, stage: Stage) -> None:
        """Begin a stage, or continue in it."""
        train, heads = self.config.train, self.model.heads
        if int(heads.tasks) < stage.task:
            self.model.start_task(len(self.data.tasks.of(stage.task)))
        heads.identifier.set("off")
        # As ORE: fine-tuning labels unknowns, but does not cluster.
        heads.clusters = not stage.finetune
        self.stage = stage
        self.cadence = Cadence(stage.last, stage.last, train.log_every, train.save_every)
        self.loader = self._loader(self.data.stage(stage), stage)

    def _loader(self, pictures: DetectionSet, stage: Stage) -> Loader:
        config, seed = self.config, self.config.train.seed + 1009 * self.stages.index(stage)
        transform = transforms.detection(config.data, config.augment)  # type: ignore[arg-type]
        test = DetectionSet("test", self.data.test, pictures.names, pictures.category_ids)
        return Loader(
            DetectionSamples(pictures, transform, seed, masks=False),
            DetectionSamples(test, None, seed, masks=False),
            np.zeros(len(pictures.pictures), np.int64),
            seed=seed,
            micro=config.train.micro_batch,
            accumulation=self.accumulation,
            fill=True,
            rank=self.rank,
            world=self.world,
            workers=config.data.workers,
            pin_memory=config.data.pin_memory and self.device.type == "cuda",
        )

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process, from the next step of the stage on."""
        self.model.train()
        return self.loader.training(self.done - self.stage.first)

    def step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step. Returns (mean loss of this process, gradient norm)."""
        config, total = self.config, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate(config.optim, self.done)
        self.parts = {}
        for turn in range(self.accumulation):
            batch = next(batches)
            seed_all(config.train.seed, self.done, turn * self.world + self.rank)
            self.statistics.remember()
            with self.autocast():
                losses = self.model(*self.inputs(batch))
            loss = add_parts(self.parts, losses, self.accumulation)
            self.scaler.scale(loss / self.accumulation).backward()
            self.statistics.merge()
            total += loss.detach() / self.accumulation
        norm = self.update(self.model.parameters(), config.optim.clip or math.inf)
        self.model.heads.clustering.commit()
        return total, norm

    def inputs(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images from 0 to 1 and targets, on the device."""
        images = [x.to(self.device, non_blocking=True).float() / 255 for x in batch.images]
        targets = [
            {key: value.to(self.device, non_blocking=True) for key, value in target.items()}
            for target in batch.targets
        ]
        return images, targets

    def row(self) -> dict[str, float]:
        """Losses by part and counts of the last micro-batch, of this process."""
        heads = self.model.heads
        return {k: float(v) for k, v in (self.parts | heads.statistics).items()}

    def fit_energies(self) -> dict[str, Any]:
        """Fit the energies of the held-out pictures and turn the decision on.

        All processes compute the same fit. Its targets are the objects of all known classes.

        Returns:
            The parameters of the fits. Nothing, and a warning, if too few regions match.
        """
        method = self.config.method
        self.same_buffers(self.model.backbone)
        with keeping_random_state():
            seed_all(self.config.train.seed, self.done, 0)
            try:
                fits = fit_energies(
                    self.model,
                    self._held_out(),
                    mode=method.energy,
                    samples=method.samples,
                    temperature=method.temperature,
                    tail=method.tail,
                    outside=method.outside,
                )
            except ValueError as error:
                _log.warning("method.energy=%s is left out: %s", method.energy, error)
                return {}
        return {name: list(fit) for name, fit in fits.items()}

    def _held_out(self) -> Iterator[Any]:
        """Batches of one picture for the fit. A warning if unknown objects are wanted and missing."""
        method, unknown = self.config.method, self.model.unknown
        pictures = self.data.fit_set(self.model.seen, unknowns=method.transductive)
        if method.transductive and not any(
            (p.objects.labels[p.objects.trained] == unknown).any() for p in pictures.pictures
        ):
            _log.warning(
                "method.transductive=true: the pictures of the fit have no annotated unknown object, "
                "so unknown energies come from pseudo-unknowns"
            )
        plain = transforms.detection(self.config.data, AugmentConfig(flip=0.0))  # type: ignore[arg-type]
        samples = DetectionSamples(pictures, plain, 0, masks=False)
        for index in range(len(pictures.pictures)):
            sample = samples[0, index]
            yield self.inputs(Batch([sample["image"]], [sample["target"]], [index]))

    @torch.no_grad()
    def detect(self) -> list[dict[str, Tensor]]:
        """Detections of all test pictures, on every process."""
        self.same_buffers(self.model.backbone)
        self.model.eval()
        found: list[Any] = []
        with keeping_random_state():
            for batch in self.loader.validation(len(self.data.test)):
                with self.autocast():
                    outputs = self.model(self.inputs(batch)[0])
                for index, output in zip(batch.indices, outputs, strict=True):
                    output["scores"] = output["scores"].float()
                    found.append((index, {k: v.cpu() for k, v in output.items()}))
        self.model.train()
        by_index: dict[int, Any] = dict(gather(found))  # type: ignore[arg-type]
        return [by_index[index] for index in range(len(self.data.test))]

    def score(self, detections: list[dict[str, Tensor]], **options: Any) -> OpenWorldResult:
        """The metrics of detections of all test pictures."""
        return open_world_evaluation(
            detections,
            self.data.targets(),
            known=self.model.seen,
            previous=int(self.model.heads.previous),
            unknown=self.model.unknown,
            image_ids=[picture.path for picture in self.data.test],
            ties="listed",
            **options,
        )

    def export(self) -> Path:
        """Write the detector, queues and fits included, to `model.safetensors`."""
        path = self.out / WEIGHTS
        about = {"names": "\n".join(self.data.tasks.names), "step": str(self.steps)}
        if self.main:
            checkpoints.save_weights(path, self.model.state_dict(), about)
        return path


def describe(run: OpenWorldRun) -> str:
    """A line about a run, and one for each stage."""
    config, tasks = run.config, run.data.tasks
    lines = [
        f"{config.model.backbone}, {config.train.policy}, {run.precision.name}: "
        f"{config.train.global_batch} pictures a step on {run.world} "
        f"process(es), {len(run.data.test)} test pictures"
    ]
    return "\n".join([*lines, *stage_lines(run.stages, tasks.classes)])


def stage_lines(stages: Sequence[Stage], classes: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a line about each stage, from the names of each task's classes."""
    for stage in stages:
        names = "all known classes" if stage.finetune else ", ".join(classes[stage.task - 1])
        yield f"  {stage.name}: steps {stage.first} to {stage.last}, {names}"
