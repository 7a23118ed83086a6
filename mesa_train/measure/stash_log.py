"""Record the stashes of one forward in order, for the planner and the timeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from mesa_train.codecs.narrow import Narrow
from mesa_train.policy import OPERATORS
from mesa_train.stash.context import Report
from mesa_train.stash.stash import Leaf, Stash

# (module, operator, operand).
Key = tuple[str, str, str]

# Stands for the operator in a key: (block, BLOCK, "") is the block itself.
BLOCK = "block"


@dataclasses.dataclass
class CheckpointInput:
    """The inputs that a checkpointed block saves.

    Args:
        matrices: (rows, cols) of every tensor.
        saved_bytes: bytes of all these tensors if they are uncompressed.
    """

    matrices: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    saved_bytes: int = 0


class StashLog(Report):
    """A report that also lists the stored stashes in the order of the forward.

    The list also shows where each of the `blocks` begins and ends.

    Args:
        hold: keep the stashes alive, to read from which stashes a rebuilt stash is made. Then the
            backward does not free them, so the peak of such a timeline means nothing.
        blocks: qualified names of the blocks.
    """

    def __init__(self, hold: bool = False, blocks: Iterable[str] = ()) -> None:
        super().__init__()
        self.hold, self.blocks = hold, frozenset(blocks)
        # True after the backward begins: stashes that a checkpoint recomputes are not in the list.
        self.closed = False
        self.stored: list[tuple[Key, int, tuple[int, int] | None]] = []
        # Inputs that checkpointed blocks save, by block.
        self.inputs: dict[str, CheckpointInput] = {}
        self.rebuilt: dict[Key, Stash] = {}
        self.leaves: dict[int, tuple[Stash, Key]] = {}
        # (weight, name of its module) by the id of the weight. Holding the weight keeps its id
        # unique.
        self.modules: dict[int, tuple[torch.Tensor, str]] = {}

    def installed(self, model: nn.Module) -> None:
        """Take the place of the report of a wrapped model."""
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                self.modules[id(weight)] = weight, name
        entry = vars(model).get("_mesa_train")
        if entry is not None:
            entry.installed.report = self

    def begins(self, module: str) -> None:
        """Note that a module's forward begins."""
        if module in self.blocks:
            self.stored.append(((module, BLOCK, "begin"), 0, None))

    def ends(self, module: str) -> None:
        """Note that a module's forward ends."""
        if module in self.blocks:
            self.stored.append(((module, BLOCK, "end"), 0, None))

    def add(
        self,
        module: str,
        operator: str,
        operand: str,
        how: str,
        size: int,
        stash: Stash | None = None,
    ) -> None:
        """Add a stash, as `Report.add` does; called once for each operand and call."""
        super().add(module, operator, operand, how, size)
        if self.closed:
            return
        key = (module, operator, operand)
        if operand == "saved" or operator not in OPERATORS:
            key = (module, "fallback", "saved")
        if stash is None:
            return
        if how == "rebuilt" and self.hold:
            self.rebuilt.setdefault(key, stash)
        elif (
            isinstance(stash.recipe, Leaf)
            and how != "shared"
            # A policy has no choice of bits for it.
            and not isinstance(stash.recipe.codec, Narrow)
        ):
            cols = stash.recipe.layout.cols
            codes = stash.tensors[0]
            rows = codes.shape[0] if codes.dim() == 2 else codes.numel() // max(cols, 1)
            if operator == "checkpoint":
                inputs = self.inputs.setdefault(module, CheckpointInput())
                inputs.matrices.append((rows, cols))
                inputs.saved_bytes += rows * cols * stash.dtype.itemsize
                return
            self.stored.append((key, size, (rows, cols)))
            if self.hold:
                self.leaves[id(stash)] = (stash, key)
