"""A training run on Accelerate's processes: precision, means, step rows, checkpoints, resume.

Why: recipes differ in data, model, loss and schedule. Checkpoints, the checks of a resumed run and
the rows of steps are the same.

How: a run subclasses `AcceleratedRun`, sets `model`, `optimizer` and `shapes`, and gives `batches`
and `step`. A checkpoint holds `model.safetensors`, `optimizer.pt` and the state of `about`; see
`checkpoints.py`. A run with files of its own overrides `write` and `read`.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mesa_train.models.moco.backward import average_gradients
from mesa_train.utils.precision import choose

from . import checkpoints, disk
from .config_schema import ConfigError
from .loop import Report, StepResult, TrainingRun, speed
from .progress import Every

CHECKPOINTS, WEIGHTS, OPTIMIZER = "checkpoints", "model.safetensors", "optimizer.pt"


class AcceleratedRun(TrainingRun, abc.ABC):
    """A model in training on any number of processes.

    Args:
        config: of the run, with the section `train`, and `to_dict`.
        accelerator: Accelerate's, for the processes and the device.
        images: training samples, which a resumed run must have too.

    Attributes:
        model: all modules whose weights a checkpoint holds; set by the subclass.
        optimizer: set by the subclass.
        shapes: of the model's keys before mesa_train wrapped it; set by the subclass.
        fixed: names of settings that decide the steps of a run, by section.
        remedy: usual remedies of a loss that is not finite.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, list[int]]
    fixed: ClassVar[Mapping[str, Sequence[str]]]
    remedy: ClassVar[str] = "a lower optim.lr"

    def __init__(self, config: Any, accelerator: Any, images: int) -> None:
        train = config.train
        self.config, self.accelerator, self.images = config, accelerator, images
        self.device: torch.device = accelerator.device
        self.precision = choose(train.precision, self.device.type)
        fp16 = self.precision.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.steps, self.out = 0, Path(train.out)

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.steps

    @property
    def main(self) -> bool:
        """True on the first process."""
        return bool(self.accelerator.is_main_process)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """The number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward in the configured precision."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def update(self, trained: Iterable[Tensor], clip: float) -> Tensor:
        """Average the gradients over processes, clip them, and step. Returns their norm.

        Args:
            trained: parameters whose gradients are clipped.
            clip: largest norm of the gradient; infinity does not clip.
        """
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def row(self) -> dict[str, float]:
        """Further columns of a step's row."""
        return {}

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss over all processes."""
        found: Tensor = self.accelerator.reduce(loss, reduction="mean")
        return found

    def accept(self, result: StepResult) -> None:
        """FloatingPointError if the loss is not finite."""
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"the loss is {result.loss} after step {result.step}; {self.remedy} usually helps"
            )

    def same_buffers(self, module: nn.Module) -> None:
        """Copy the first process's buffers of a module to all processes; a checkpoint has these."""
        if self.world == 1:
            return
        from accelerate.utils import broadcast

        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer.detach().clone()))

    def about(self) -> dict[str, Any]:
        """The state of a checkpoint beside its files."""
        return {
            "step": self.steps,
            "config": self.config.to_dict(),
            "shapes": self.shapes,
            "images": self.images,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state that `about` gave."""
        self.steps = int(state["step"])

    def write(self, folder: Path) -> None:
        """Write weights and optimizer into a folder. Called on all processes."""
        if self.main:
            checkpoints.save_weights(folder / WEIGHTS, self.model.state_dict(), {})
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            torch.save(state, folder / OPTIMIZER)

    def read(self, folder: Path) -> None:
        """Read what `write` wrote. Called on all processes."""
        checkpoints.load_weights(self.model, folder / WEIGHTS)
        with disk.reading(folder / OPTIMIZER):
            found = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(found["optimizer"])
            self.scaler.load_state_dict(found["scaler"])

    def save(self) -> Path:
        """Write a checkpoint; all processes wait until it is complete.

        Raises:
            CheckpointError: on all processes if it cannot be written.
        """
        from accelerate.utils import gather_object

        folder = self.out / CHECKPOINTS
        written = checkpoints.partial(folder, self.steps)
        final = folder / written.name.removeprefix(checkpoints.PARTIAL)

        def clear() -> None:
            if self.main:
                checkpoints.clear(written)

        def commit() -> None:
            if self.main:
                checkpoints.commit(written, self.about(), self.config.train.keep)

        # Each call waits for all processes.
        for part in (clear, lambda: self.write(written), commit):
            disk.together(part, final, written, gather_object)
        return final

    def resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoints.verify` has accepted.

        Raises:
            CheckpointError: the checkpoint is of another model.
            ConfigError: a setting of `fixed` or the number of samples differs, so that the steps
                would not match.
        """
        with disk.reading(checkpoint):
            checkpoints.check_keys(checkpoint, state["shapes"], self.shapes)
        check_settings(checkpoint, state, self.config, self.fixed)
        checkpoints.check_images(checkpoint, state, self.images)
        self.read(checkpoint)
        with disk.reading(checkpoint):
            self.restore(state)


def resume(run: AcceleratedRun, how: str, metrics: str) -> bool:
    """Continue a run.

    Args:
        run: ready to start.
        how: "auto" for the newest complete checkpoint, "" for a new run, or a checkpoint's path.
        metrics: name of the file of rows in the run's folder.
    Returns:
        True if the run continues.
    Raises:
        ConfigError: there is no such checkpoint, or a new run would overwrite another.
    """
    if how not in ("", "auto"):
        if not Path(how).is_dir():
            raise ConfigError(f"--resume: no such checkpoint {how}")
        found = Path(how), checkpoints.verify(Path(how))
    else:
        newest = checkpoints.newest(run.out / CHECKPOINTS)
        if newest is not None and not how:
            raise ConfigError(
                f"train.out={run.out} holds a run already: --resume auto continues it, or choose "
                "another folder"
            )
        if newest is None:
            if run.main:
                (run.out / metrics).unlink(missing_ok=True)
            return False
        found = newest
    run.resume(*found)
    if run.main:
        disk.forget_after(run.out / metrics, run.done)
    return True


def check_settings(
    checkpoint: Path, state: dict[str, Any], config: Any, fixed: Mapping[str, Sequence[str]]
) -> None:
    """ConfigError if a setting differs from the checkpoint's, so that the steps would not match.

    Args:
        checkpoint: its folder.
        state: of the checkpoint, from `checkpoints.verify`.
        config: of the run.
        fixed: names of settings, by section of the configuration.
    """
    with disk.reading(checkpoint):
        before = {
            (s, name): state["config"][s][name] for s, names in fixed.items() for name in names
        }
    for (section, name), then in before.items():
        now = getattr(getattr(config, section), name)
        if then != now:
            raise ConfigError(
                f"{section}.{name}={now}, but {checkpoint} was trained with {then}; keep it or "
                "choose another train.out"
            )


def add_parts(sums: dict[str, Tensor], losses: Mapping[str, Tensor], count: int) -> Tensor:
    """Add the losses of a micro-batch to those of its step. Returns their sum, for the backward.

    Args:
        sums: detached losses of the step by name; changed.
        losses: of the micro-batch by name.
        count: micro-batches of the step; the sums are means over them.
    """
    for name, value in losses.items():
        part = value.detach().float() / count
        sums[name] = sums[name] + part if name in sums else part
    return torch.stack([value.float() for value in losses.values()]).sum()


def step_report(
    run: AcceleratedRun,
    metrics: Path,
    more: Callable[[StepResult], Mapping[str, Any]] = lambda _: {},
    label: Callable[[], str] = lambda: "",
) -> Report:
    """The report of a step: a row in the run's file and, not too often, a printed line.

    Args:
        run: in training.
        metrics: the file.
        more: further columns of a row.
        label: start of the printed line.
    """
    said = Every()
    if run.main:
        run.out.mkdir(parents=True, exist_ok=True)

    def report(result: StepResult) -> None:
        if not run.main:
            return
        # The means over the steps replace a part of the loss that has the same name.
        row: dict[str, Any] = run.row() | {"loss": result.loss, "grad_norm": result.grad_norm}
        row |= {"lr": result.lr, "step_ms": result.step_ms, "wait_ms": result.wait_ms}
        row |= speed(run.config.train.global_batch, result.step_ms, run.device)
        disk.append(metrics, {"kind": "step", "step": result.step, **row, **more(result)})
        said(f"{label()}step {result.step} of {run.cadence.steps}, loss {result.loss:.4g}")

    return report
