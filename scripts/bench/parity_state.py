"""What `train_parity.py` keeps on disk: checkpoints of unfinished seeds, and plain's weights.

A seed has a folder, named after its settings. The folder holds

- `plain.pt`: the first and last weights of plain. A later call compares other policies with them.
- `epoch-NAMES.pt`, while a seed runs: all trainers after the last whole epoch, and the rows so far.
  NAMES is a hash of the policies that train side by side.

A checkpoint has no state of random generators. `fit` seeds them in each step from (seed, step), and
batches depend on (seed, epoch) alone. A file is written under another name first, so a process that is
killed leaves the last whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train import Policy
from mesa_train.engine.entry import ATTRIBUTE
from mesa_train.training.disk import reading
from mesa_train.training.trainer import Trainer
from mesa_train.utils.records import Row


@dataclass
class Progress:
    """A seed after a number of whole epochs.

    Attributes:
        trainers: by name.
        first: plain's first weights, or None without plain.
        epochs: how many are done.
        rows: of these epochs.
    """

    trainers: dict[str, Trainer]
    first: Tensor | None
    epochs: int
    rows: list[Row]


class SeedFolder:
    """The files of one seed.

    Args:
        root: folder of all seeds.
        settings: the settings of the runs.
        seed: the seed.
        policies: the policies that train side by side, by name.
    """

    def __init__(
        self, root: Path, settings: Row, seed: int, policies: Mapping[str, Policy | None]
    ) -> None:
        texts = {name: policy and policy.to_yaml() for name, policy in policies.items()}
        self.folder = root / f"{_hash(settings)}-seed-{seed}"
        self.checkpoint = self.folder / f"epoch-{_hash(texts)}.pt"
        self.plain = self.folder / "plain.pt"

    def save(self, progress: Progress) -> None:
        """Write the checkpoint."""
        _write(self.checkpoint, vars(progress))

    def load(self) -> Progress | None:
        """Read the checkpoint, or return None without one. CheckpointError if it is damaged."""
        if not self.checkpoint.exists():
            return None
        with reading(self.checkpoint):
            # The file is this script's own, and holds whole modules.
            progress = Progress(**torch.load(self.checkpoint, weights_only=False))
        for trainer in progress.trainers.values():
            entry = trainer.model.__dict__.get(ATTRIBUTE)
            if entry is not None:
                # Running ranges change once a step. The copy does not know of the step before it.
                entry.installed.steps.count += 1
        return progress

    def finish(self) -> None:
        """Remove the checkpoint: the rows are written."""
        self.checkpoint.unlink(missing_ok=True)

    def save_plain(self, first: Tensor, last: Tensor) -> None:
        """Keep plain's first and last weights."""
        _write(self.plain, {"first": first, "last": last})

    def load_plain(self) -> tuple[Tensor, Tensor] | None:
        """Plain's first and last weights, or None if no run has left them."""
        if not self.plain.exists():
            return None
        with reading(self.plain):
            vectors = torch.load(self.plain)
        return vectors["first"], vectors["last"]


def _hash(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, value: Any) -> None:
    """Write a file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)
