"""Training run on any number of processes, through Accelerate: steps, evaluation, checkpoints.

The random generators of a step are seeded from (seed, step, rank). A checkpoint holds all other
state, so a run that was killed continues exactly. Gradients are clipped once in an optimizer step.
Evaluation uses the batch norm statistics of the first rank, because the checkpoint holds these.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mesa_train
from mesa_train import CapturedStep, CaptureError
from mesa_train.integrations.accelerate import capture_step
from mesa_train.methods.apply import PLAIN
from mesa_train.training import checkpoints, disk
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.loader import Batch, Loader
from mesa_train.training.data.sources import keeping_random_state, seed_all
from mesa_train.training.loop import Cadence, StepResult, TrainingRun

from . import optimizers
from .accelerated import accelerator, gather
from .config import Config
from .dry_run import Plan, parameter_groups
from .methods import method_of
from .train_state import Scores, TrainState, score

_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


class Run(TrainingRun):
    """A model in training.

    Args:
        config: of the run.
        model: the plain model. The constructor wraps it by mesa_train if the policy is not "plain".
        plan: batches and steps.
        loader: training and validation batches.
        classes: number of classes.
    """

    def __init__(
        self, config: Config, model: nn.Module, plan: Plan, loader: Loader, classes: int
    ) -> None:
        self.config, self.plan, self.loader, self.classes = config, plan, loader, classes
        self.position = TrainState()
        train = config.train
        self.cadence = Cadence(plan.steps, plan.steps_per_epoch, train.log_every, train.save_every)
        self.accelerator = accelerator(config, plan)
        self.out = Path(config.train.out)
        self.images = loader.sources.train.count
        self.shapes = checkpoints.shapes(model)
        if config.model.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.train.policy != PLAIN:
            mesa_train.wrap(model, config.train.policy)
        self.method = method_of(config)
        groups = parameter_groups(config, model)
        optimizer = optimizers.build(config.optim, groups, capturable=train.cuda_graph)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = optimizers.Schedule(
            self.optimizer,
            config.optim,
            config.train.global_batch,
            config.train.epochs,
            plan.steps_per_epoch,
        )
        self.mixup = None if self.method.mixes else _mixup(config, classes)
        self.ema = self._averaged() if config.train.ema else None
        self.captured = self._captured() if train.cuda_graph else None
        self.method.prepared(self)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.accelerator.process_index

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def bare(self) -> nn.Module:
        """The model without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def batches(self) -> Iterator[Batch]:
        """Micro-batches from the next step to the end of its epoch."""
        self.method.mode(self.model)
        return self.method.batches(self, *divmod(self.done, self.plan.steps_per_epoch))

    def step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Take one optimizer step of `accumulation` micro-batches.

        Returns:
            (mean loss, gradient norm).
        """
        clip, position, total = self.config.optim.clip or math.inf, self.position, None
        norm = torch.zeros((), device=self.accelerator.device)
        self.schedule.at(position.step)
        self.method.rates(self.optimizer, position.step // self.plan.steps_per_epoch)
        for turn in range(self.plan.accumulation):
            images, labels, skipped = next(batches)
            if skipped:
                position.skipped += len(skipped)
                _log.warning("skipped %s", ", ".join(skipped))
            # Mixup, drop path and dropout use these generators.
            seed_all(self.config.train.seed, position.step, turn, self.rank)
            inputs = self.inputs(images, labels)
            if self.captured is not None:
                loss = self.captured(*inputs)
                total = loss if total is None else total + loss
                continue
            with self.accelerator.accumulate(self.model):
                loss = self.loss(*inputs)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    norm = norm if clipped is None else torch.as_tensor(clipped).to(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if self.captured is not None and self.captured.grad_norm is not None:
            norm = self.captured.grad_norm
        position.step += 1
        if self.ema is not None:
            self.ema.update(self.bare, step=position.step)
        return total / self.plan.accumulation, norm

    def inputs(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(images, targets) on the device. With mixup the targets are soft."""
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of the method; without a method `criterion` of the model's logits."""
        return self.method.loss(self, images, targets)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in float32. Soft targets are smooth already."""
        if self.mixup is not None:
            return F.cross_entropy(logits.float(), targets.float())
        smoothing = self.config.augment.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def evaluate(self, averaged: bool = False, tick: Callable[[], None] | None = None) -> Scores:
        """Score the model, or its averaged weights, on all validation images.

        Args:
            averaged: score the averaged weights.
            tick: called after every batch.
        """
        model: Any = self.ema.module if averaged and self.ema is not None else self.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._same_buffers(model.module)
            model = model.module
        with keeping_random_state():
            return score(model, self.loader.validation(), self.accelerator, tick)

    def save(self) -> Path:
        """Write a checkpoint. All ranks take part.

        Returns:
            The folder of the checkpoint.
        Raises:
            CheckpointError: on all ranks if one rank fails; names the last complete checkpoint.
        """
        folder, main = self.out / CHECKPOINTS, self.accelerator.is_main_process
        written = checkpoints.partial(folder, self.position.step)
        final = folder / written.name.removeprefix(checkpoints.PARTIAL)

        def write() -> None:
            with disk.to_the_end(self.model):
                self.accelerator.save_state(str(written))
            if self.ema is not None and main:
                averaged = self.ema.module.state_dict()
                checkpoints.save_weights(written / "ema.safetensors", averaged, {})

        def commit() -> None:
            state = {
                "position": dataclasses.asdict(self.position),
                "config": self.config.to_dict(),
                "shapes": self.shapes,
                "images": self.images,
            }
            checkpoints.commit(written, state, self.config.train.keep)

        # Each call waits for all ranks.
        disk.together(lambda: checkpoints.clear(written) if main else None, final, written, gather)
        disk.together(write, final, written, gather)
        disk.together(lambda: commit() if main else None, final, written, gather)
        return final

    def resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoints.verify` has accepted.

        Raises:
            CheckpointError: the checkpoint is of another model.
            ConfigError: batch size, epochs, seed or data differ, so that the steps would not match.
        """
        with disk.reading(checkpoint):
            position = TrainState(**state["position"])
            before: dict[str, Any] = {
                f"train.{key}": state["config"]["train"][key]
                for key in ("global_batch", "epochs", "seed")
            }
            checkpoints.check_keys(checkpoint, state["shapes"], self.shapes)
        for name, then in before.items():
            now = getattr(self.config.train, name.removeprefix("train."))
            if then != now:
                raise ConfigError(
                    f"{name}={now}, but {checkpoint} was trained with {then}; "
                    "keep it or choose another train.out"
                )
        checkpoints.check_images(checkpoint, state, self.images)
        with disk.reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
            if self.ema is not None:
                if (checkpoint / "ema.safetensors").is_file():
                    checkpoints.load_weights(self.ema.module, checkpoint / "ema.safetensors")
                else:
                    self.ema.set(self.bare)
        self.position = position

    def save_best(self, scores: Scores, averaged: bool) -> bool:
        """Write the weights to `best.safetensors` if the scores are the best so far.

        Returns:
            Whether the weights were written.
        Raises:
            CheckpointError: on all ranks if the file cannot be written; names the last complete
                checkpoint.
        """
        if scores.top1 <= self.position.best:
            return False
        self.position.best = scores.top1
        if averaged and self.ema is not None:
            weights = self.ema.module.state_dict()
        else:
            weights = self.accelerator.get_state_dict(self.model)
        about = {
            "model": self.config.model.name,
            "classes": str(self.classes),
            "top1": f"{scores.top1:.4f}",
            "step": str(self.position.step),
        }
        path, main = self.out / "best.safetensors", self.accelerator.is_main_process

        def write() -> None:
            if main:
                checkpoints.save_weights(path, weights, about)

        disk.together(write, path, checkpoints.beside(path), gather, self.out / CHECKPOINTS)
        return True

    def last_good(self) -> str:
        """Text that names the checkpoint from which a failed run can continue."""
        return disk.last_good(self.out / CHECKPOINTS)

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all processes."""
        return self.accelerator.reduce(loss, reduction="mean")

    def accept(self, result: StepResult) -> None:
        """Add the losses to the epoch's. FloatingPointError if the loss is not finite."""
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"the loss is {result.loss} after step {result.step}; a lower optim.lr, or "
                "train.precision=bf16 or no instead of fp16, usually helps"
            )
        self.position.loss += result.loss * result.steps
        self.position.losses += result.steps

    def _same_buffers(self, module: nn.Module) -> None:
        """Copy the first rank's buffers to all ranks."""
        from accelerate.utils import broadcast

        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer.detach().clone()))

    def _captured(self) -> CapturedStep:
        """The step as CUDA graphs. ConfigError with the reason if it cannot be captured."""
        try:
            return capture_step(
                self.accelerator,
                self.model,
                self.criterion,
                self.optimizer,
                clip_norm=self.config.optim.clip or None,
            )
        except CaptureError as error:
            raise ConfigError(f"train.cuda_graph=true: {error}") from None

    def _averaged(self) -> Any:
        """A copy of the model with averaged weights."""
        from timm.utils import ModelEmaV3

        if not isinstance(self.model, (type(self.bare), nn.parallel.DistributedDataParallel)):
            raise ConfigError("train.ema needs the whole model on every device, not FSDP or ZeRO")
        # Without a warm-up, the average of a short run would stay close to the initial weights.
        return ModelEmaV3(self.bare, decay=self.config.train.ema, use_warmup=True)


def _mixup(config: Config, classes: int) -> Any:
    """timm's Mixup of a configuration; None if both mixup and cutmix are off."""
    from timm.data import Mixup

    augment = config.augment
    if augment.mixup <= 0 and augment.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.label_smoothing,
        num_classes=classes,
    )
