"""Training run of a detector or a segmenter on any number of processes, through Accelerate.

The random generators of a micro-batch are seeded from (seed, step, micro-batch), and micro-batches do
not depend on the number of processes. Two processes therefore have the losses of one. A checkpoint
holds all other state, so a run that was killed continues exactly.

Batch norms have the statistics of one micro-batch, as the authors' detectors. Evaluation uses the
running statistics of the first process, because the checkpoint holds these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.training import checkpoints, disk
from mesa_train.training.accelerated_run import CHECKPOINTS as CHECKPOINTS
from mesa_train.training.accelerated_run import AcceleratedRun, add_parts
from mesa_train.training.classification.accelerated import gather
from mesa_train.training.data.sources import keeping_random_state, seed_all
from mesa_train.training.loop import Cadence, StepResult

from . import optimizers
from .config import Config
from .loader import Batch, Loader
from .tasks import Scores, Task, finite

BEST = "best.safetensors"


class DenseRun(AcceleratedRun):
    """A model in training.

    Args:
        config: of the run, for the number of processes (`dry_run.shared`).
        task: the data and the metric.
        model: the plain model. The constructor wraps it by mesa_train if the policy is not "plain".
        accelerator: Accelerate's, see `accelerator_of`.
    Raises:
        ConfigError: the pictures do not fill one step.
    """

    config: Config
    # They decide which micro-batches a step has.
    fixed: ClassVar = {"train": ("global_batch", "micro_batch", "epochs", "steps", "seed")}
    remedy = "a lower optim.lr, more optim.warmup_steps, or optim.clip,"

    def __init__(self, config: Config, task: Task, model: nn.Module, accelerator: Any) -> None:
        super().__init__(config, accelerator, len(task.groups))
        train, data = config.train, config.data
        self.task = task
        self.accumulation = train.global_batch // (train.micro_batch * self.world)
        self.loader = Loader(
            task.train,
            task.val,
            task.groups,
            seed=train.seed,
            micro=train.micro_batch,
            accumulation=self.accumulation,
            fill=task.fill,
            rank=self.rank,
            world=self.world,
            workers=data.workers,
            pin_memory=data.pin_memory and self.device.type == "cuda",
        )
        steps = train.steps or train.epochs * self.loader.steps
        every = train.eval_every * (1 if train.steps else self.loader.steps)
        self.cadence = Cadence(steps, every, train.log_every, train.save_every)
        self.best = -1.0
        self.parts: dict[str, Tensor] = {}
        # Sum of the losses since the last evaluation, and their number.
        self.loss_sum, self.losses = 0.0, 0
        self.shapes = checkpoints.shapes(model)
        if config.model.sync_batch_norm:
            head: Any = model.decode_head
            model.decode_head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        if train.policy != PLAIN:
            mesa_train.wrap(model, train.policy)
        optimizer = optimizers.build(config.optim, optimizers.groups(model, config.optim))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @property
    def bare(self) -> Any:
        """The model without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process, from the next step on."""
        self.model.train()
        return self.loader.training(self.done)

    def step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step. Returns (mean loss of this process, gradient norm)."""
        train, total, norm = self.config.train, torch.zeros((), device=self.device), None
        rate = optimizers.rate(self.config.optim, self.done, self.cadence.steps, self.loader.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.parts = {}
        for turn in range(self.accumulation):
            batch = next(batches)
            # Drop path, dropout and the choice of regions use these generators.
            seed_all(train.seed, self.done, turn * self.world + self.rank)
            with self.accelerator.accumulate(self.model):
                losses = self.task.losses(self.model, batch, self.device)
                loss = add_parts(self.parts, losses, self.accumulation)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    clip = self.config.optim.clip or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / self.accumulation
        self.steps += 1
        return total, torch.zeros_like(total) if norm is None else torch.as_tensor(norm).to(total)

    def row(self) -> dict[str, float]:
        """The losses of this process's last step by part. Waits for the device."""
        return {name: float(value) for name, value in self.parts.items()}

    def accept(self, result: StepResult) -> None:
        """Add the losses to the epoch's. FloatingPointError if the loss is not finite."""
        super().accept(result)
        self.loss_sum += result.loss * result.steps
        self.losses += result.steps

    @torch.no_grad()
    def evaluate(self) -> Scores:
        """The scores of all validation pictures, the same on all processes."""
        from accelerate.utils import broadcast_object_list

        self.same_buffers(self.bare)
        model = self.bare.eval()
        found: list[Any] = []
        with keeping_random_state():
            for batch in self.loader.validation(self.task.count):
                found += self.task.predict(model, batch, self.device)
        predictions = gather(found)
        scores = [finite(self.task.scores(predictions)) if self.main else {}]
        broadcast_object_list(scores)
        model.train()
        return scores[0]

    def about(self) -> dict[str, Any]:
        """The state of a checkpoint beside its files."""
        return super().about() | {"best": self.best, "losses": [self.loss_sum, self.losses]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state that `about` gave."""
        super().restore(state)
        self.best = float(state["best"])
        self.loss_sum, self.losses = float(state["losses"][0]), int(state["losses"][1])

    def write(self, folder: Path) -> None:
        """Write Accelerate's state into a folder."""
        with disk.to_the_end(self.model):
            self.accelerator.save_state(str(folder))

    def read(self, folder: Path) -> None:
        """Read Accelerate's state."""
        with disk.reading(folder):
            self.accelerator.load_state(str(folder))

    def save_best(self, scores: Scores) -> bool:
        """Write the weights to `best.safetensors` if the scores are the best so far.

        Without a score, as of a split without objects, the newest weights are the best.
        """
        value = scores.get(self.task.metric)
        if value is not None and value <= self.best:
            return False
        self.best = self.best if value is None else value
        weights = self.accelerator.get_state_dict(self.model)
        about = {
            "kind": self.config.model.kind,
            "backbone": self.config.model.backbone,
            "names": json.dumps(self.task.names),
            "step": str(self.done),
        }
        if value is not None:
            about[self.task.metric] = f"{value:.4f}"
        path = self.out / BEST

        def write() -> None:
            if self.main:
                checkpoints.save_weights(path, weights, about)

        folder = self.out / CHECKPOINTS
        disk.together(write, path, checkpoints.beside(path), gather, folder)
        return True
