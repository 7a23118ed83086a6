"""Plain classification as a training method, and the hooks that other methods override.

A run calls the hooks in this order:

1. `options` and `built`, for the model, and `load`, for the file that the model starts from.
2. `groups`, for the optimizer, and `prepared`, when the run is ready or may be resumed.
3. `begin`, before the first step of a new run.
4. `mode` and `batches`, for each epoch; `rates` and `loss`, in each step.
5. `scores` and `finish_epoch`, after each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mesa_train.training.data.loader import Batch

from .config import Config
from .start import start_from

Weights = dict[str, Tensor]


class Method:
    """Plain classification.

    Args:
        config: of the run.

    Attributes:
        mixes: true if `batches` applies mixup itself.
    """

    mixes = False

    def __init__(self, config: Config) -> None:
        self.config, self.method = config, config.method

    def options(self) -> dict[str, Any]:
        """Options of the model."""
        return {}

    def built(self, model: nn.Module) -> None:
        """Called with each new model, on the meta device too. It may freeze parameters."""

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the file `model.weights`.

        Raises:
            ConfigError: the file cannot be read.
            CheckpointError: keys or shapes differ.
        """
        start_from(model, path, self.config.model.allow_config, self.weights)

    def mode(self, model: nn.Module) -> None:
        """Put the model into the mode of its training steps."""
        model.train()

    def prepared(self, run: Any) -> None:
        """Called at the end of the run's constructor, before a checkpoint is read."""

    def weights(self, found: Weights) -> Weights:
        """The weights to start from, of those in the file."""
        return found

    def groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:  # noqa: ARG002
        """The optimizer's parameter groups, of the recipe's groups."""
        return groups

    def counted_loss(self, model: nn.Module, output: Any) -> Tensor:  # noqa: ARG002
        """A loss of `output` that saves as many bytes as `loss`, to count them."""
        logits: Tensor = output
        return -logits.float().log_softmax(dim=-1).mean()

    def teacher_bytes(self, classes: int) -> int:  # noqa: ARG002
        """Bytes of the weights of a teacher; 0 without one."""
        return 0

    def begin(self, run: Any) -> None:
        """Called before the first step of a new run."""

    def check_files(self) -> None:
        """ConfigError if a file of the method is missing. Called before anything is built."""

    def plan(self, classes: int, images: int) -> list[str]:  # noqa: ARG002
        """Further lines of a dry run."""
        return []

    def batches(self, run: Any, epoch: int, first: int) -> Iterator[Batch]:
        """The micro-batches of an epoch, from its optimizer step `first`."""
        return run.loader.training(epoch, first)

    def rates(self, optimizer: Any, epoch: int) -> None:
        """Called after the schedule has set the rates of a step. `epoch` counts from 0."""

    def loss(self, run: Any, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a micro-batch."""
        return run.criterion(run.model(images), targets)

    def scores(self, run: Any) -> dict[str, float]:  # noqa: ARG002
        """Further scores of an epoch, by name, on all ranks."""
        return {}

    def finish_epoch(self, run: Any) -> None:
        """Called on all ranks after each epoch."""
