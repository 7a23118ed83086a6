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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mesa_train
from mesa_train.methods.apply import PLAIN
from mesa_train.training import checkpoints, disk
from mesa_train.training.classification.accelerated import gather
from mesa_train.training.data.sources import keeping_random_state, seed_all
from mesa_train.training.loop import Cadence, StepResult, TrainingRun
from mesa_train.training.recipe_run import check_settings

from . import optimizers
from .config import Config
from .loader import Batch, Loader
from .tasks import Scores, Task, finite

CHECKPOINTS, BEST = "checkpoints", "best.safetensors"
# Settings that decide which micro-batches a step has.
_KEPT = ("global_batch", "micro_batch", "epochs", "steps", "seed")


class DenseRun(TrainingRun):
    """A model in training.

    Args:
        config: of the run, for the number of processes (`dry_run.shared`).
        task: the data and the metric.
        model: the plain model. The constructor wraps it by mesa_train if the policy is not "plain".
        accelerator: Accelerate's, see `accelerator_of`.
    Raises:
        ConfigError: the pictures do not fill one step.
    """

    def __init__(self, config: Config, task: Task, model: nn.Module, accelerator: Any) -> None:
        train, data = config.train, config.data
        self.config, self.task, self.accelerator = config, task, accelerator
        world = accelerator.num_processes
        self.accumulation = train.global_batch // (train.micro_batch * world)
        self.loader = Loader(
            task.train,
            task.val,
            task.groups,
            seed=train.seed,
            micro=train.micro_batch,
            accumulation=self.accumulation,
            fill=task.fill,
            rank=accelerator.process_index,
            world=world,
            workers=data.workers,
            pin_memory=data.pin_memory and accelerator.device.type == "cuda",
        )
        self.steps = train.steps or train.epochs * self.loader.steps
        every = train.eval_every * (1 if train.steps else self.loader.steps)
        self.cadence = Cadence(self.steps, every, train.log_every, train.save_every)
        self.out, self.step_done, self.best = Path(train.out), 0, -1.0
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
    def done(self) -> int:
        """Optimizer steps done."""
        return self.step_done

    @property
    def main(self) -> bool:
        """True on the first process."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

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
        rate = optimizers.rate(self.config.optim, self.done, self.steps, self.loader.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.parts = {}
        for turn in range(self.accumulation):
            batch = next(batches)
            # Drop path, dropout and the choice of regions use these generators.
            seed_all(train.seed, self.done, turn * world + rank)
            with self.accelerator.accumulate(self.model):
                losses = self.task.losses(self.model, batch, self.device)
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    clip = self.config.optim.clip or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / self.accumulation
            for name, value in losses.items():
                part = value.detach().float() / self.accumulation
                self.parts[name] = self.parts[name] + part if name in self.parts else part
        self.step_done += 1
        return total, torch.zeros_like(total) if norm is None else torch.as_tensor(norm).to(total)

    def row(self) -> dict[str, float]:
        """The losses of this process's last step by part. Waits for the device."""
        return {name: float(value) for name, value in self.parts.items()}

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all processes."""
        found: Tensor = self.accelerator.reduce(loss, reduction="mean")
        return found

    def accept(self, result: StepResult) -> None:
        """Add the losses to the epoch's. FloatingPointError if the loss is not finite."""
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"the loss is {result.loss} after step {result.step}; a lower optim.lr, more "
                "optim.warmup_steps, or optim.clip, usually helps"
            )
        self.loss_sum += result.loss * result.steps
        self.losses += result.steps

    @torch.no_grad()
    def evaluate(self) -> Scores:
        """The scores of all validation pictures, the same on all processes."""
        from accelerate.utils import broadcast_object_list

        self._same_buffers()
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

    def save(self) -> Path:
        """Write a checkpoint. All processes take part.

        Raises:
            CheckpointError: on all processes if it cannot be written.
        """
        folder = self.out / CHECKPOINTS
        written = checkpoints.partial(folder, self.done)
        final = folder / written.name.removeprefix(checkpoints.PARTIAL)

        def write() -> None:
            with disk.to_the_end(self.model):
                self.accelerator.save_state(str(written))

        def commit() -> None:
            state = {
                "step": self.done,
                "best": self.best,
                "losses": [self.loss_sum, self.losses],
                "config": self.config.to_dict(),
                "shapes": self.shapes,
                "images": len(self.task.groups),
            }
            checkpoints.commit(written, state, self.config.train.keep)

        # Each call waits for all processes.
        for part in (lambda: checkpoints.clear(written), write, commit):
            work = part if part is write or self.main else lambda: None
            disk.together(work, final, written, gather)
        return final

    def resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoints.verify` has accepted.

        Raises:
            CheckpointError: the checkpoint is of another model.
            ConfigError: batch, length, seed or data differ, so that the steps would not match.
        """
        with disk.reading(checkpoint):
            checkpoints.check_keys(checkpoint, state["shapes"], self.shapes)
        check_settings(checkpoint, state, self.config, {"train": _KEPT})
        checkpoints.check_images(checkpoint, state, len(self.task.groups))
        with disk.reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
        self.step_done, self.best = int(state["step"]), float(state["best"])
        self.loss_sum, self.losses = float(state["losses"][0]), int(state["losses"][1])

    def save_best(self, scores: Scores) -> bool:
        """Write the weights to `best.safetensors` if the scores are the best so far."""
        value = scores.get(self.task.metric, 0.0)
        if value <= self.best:
            return False
        self.best = value
        weights = self.accelerator.get_state_dict(self.model)
        about = {
            "kind": self.config.model.kind,
            "backbone": self.config.model.backbone,
            "names": json.dumps(self.task.names),
            "step": str(self.done),
            self.task.metric: f"{value:.4f}",
        }
        path = self.out / BEST

        def write() -> None:
            if self.main:
                checkpoints.save_weights(path, weights, about)

        folder = self.out / CHECKPOINTS
        disk.together(write, path, checkpoints.beside(path), gather, folder)
        return True

    def _same_buffers(self) -> None:
        """Copy the first process's buffers to all processes."""
        if self.accelerator.num_processes == 1:
            return
        from accelerate.utils import broadcast

        for buffer in self.bare.buffers():
            buffer.copy_(broadcast(buffer.detach().clone()))
