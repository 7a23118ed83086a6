"""List the choices for one model and batch, and simulate steps with the simplest choices.

Forwards on fake tensors show candidates and blocks. Three kinds of simulated steps show the working
set of every part under each strategy: all candidates in 8 bits, all blocks left to PyTorch, and all
blocks checkpointed. Two real steps show the workspace of the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.measure.footprint import Footprint, footprint
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.stash_log import BLOCK, Key
from mesa_train.measure.step import device_of
from mesa_train.measure.timeline import Timeline, timeline
from mesa_train.methods.apply import PLAIN
from mesa_train.methods.checkpointing import find_blocks
from mesa_train.policy import PRESETS, Policy

from .blocks import PYTORCH, STASHES, STRATEGIES, block_of
from .candidates import KEEP, Candidate, as_policy, candidates_of
from .simulator import Choices, Order, Row, SimulatedStep, StepSimulator


class SearchSpace:
    """The choices for one model and batch.

    Args:
        model: the module.
        inputs: as for `footprint`.
        autocast: the dtype of autocast; None runs without autocast.
        loss: from the output to a scalar.

    Attributes:
        candidates: the saved tensors to choose for.
        simulator: simulates steps, and lists the blocks.
        order: the stashes in the order of the forward.
        rows: moments of the steps with the simplest choices.
        block_inputs: the saved inputs of checkpointed blocks, as candidates.

    Raises:
        ValueError: there is nothing to choose.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        autocast: torch.dtype | None,
        loss: Callable[[Any], Tensor],
    ) -> None:
        self.model, self.inputs, self.autocast, self.loss = model, inputs, autocast, loss
        device = device_of(model)
        self.real = device.type != "meta"
        # A CPU has nothing to offload. A model on meta is planned for a GPU.
        self.offloadable = device.type in ("meta", "cuda")
        self.modes = {n: m for n, m in STRATEGIES.items() if self.offloadable or not m.offloaded}
        self.base = PRESETS["mesa8"]
        names = list(find_blocks(self.model))
        self.simulator = StepSimulator(self.model, self.inputs, self.autocast, self.loss, names)
        stored, first = self.simulator.watch(self.base)
        linear = dataclasses.replace(self.base, recompute="linear")
        rebuilding, _ = self.simulator.watch(linear, holding=True)
        whole, _ = self.simulator.watch(dataclasses.replace(self.base, bits=32))
        begun = [key[0] for key, *_ in stored.stored if key[1:] == (BLOCK, "begin")]
        once = [name for name in names if begun.count(name) == 1]
        self.candidates = candidates_of(stored, rebuilding, whole, once)
        for candidate in self.candidates:
            candidate.offloadable = self.offloadable
        if not self.candidates:
            raise ValueError(
                f"{type(self.model).__name__} stores no tensor of {self.base.min_bytes} bytes or "
                "more with this batch, so there is nothing to choose"
            )
        used = {candidate.block for candidate in self.candidates}
        self.simulator.blocks = [name for name in once if name in used]
        parents = {name.rpartition(".")[0] for name in self.simulator.blocks}
        self.siblings = {p: len(list(self.model.get_submodule(p).children())) for p in parents}
        self.order = Order.of(stored, self.candidates)
        self._measure_workspace(first)
        order = [key for key, *_ in stored.stored]
        eight = self.all(8)
        self.rows = self.simulator.rows(
            SimulatedStep(eight, self.simulator.whole(first, eight), order), self.order
        )
        self.block_inputs: dict[str, Candidate] = {}
        if self.simulator.blocks:
            self._blocks()

    def _blocks(self) -> None:
        """Count steps with all blocks checkpointed, or left to PyTorch."""
        modes = self.simulator.blocks
        watch, _ = self.simulator.watch(self.policy(self.all(8, "checkpoint, input 8 bits")))
        self.block_inputs = {
            b: Candidate(
                (b, "checkpoint", "input"), 0, inputs.matrices, inputs.saved_bytes, block=b
            )
            for b, inputs in watch.inputs.items()
            if b in modes
        }
        plain = self.footprint(self.policy(self.all(8, PYTORCH))).by_module
        for block in modes:
            inside = [size for module, size in plain.items() if block_of(module, [block])]
            self.order.kept[block, PYTORCH] = sum(inside)
            for name, mode in self.modes.items():
                if mode.checkpointed:
                    kept = 0 if mode.offloaded else self.input_bytes(block, mode.bits)
                    self.order.kept[block, name] = kept
        for name in (PYTORCH, "checkpoint, input 8 bits", "checkpoint of codes, input 8 bits"):
            choices = self.all(8, name)
            rows = self.simulator.rows(
                self.simulator.simulated(self.policy(choices), choices), self.order
            )
            self.rows |= {part: own for part, own in rows.items() if part[0] is not None}
        for block in modes:
            for name, mode in self.modes.items():
                if not mode.checkpointed or (block, name) in self.rows:
                    continue
                like = "checkpoint of codes" if mode.codes else "checkpoint"
                row = self.rows[block, f"{like}, input 8 bits"][0]
                # The decoded input exists beside its codes. An uncompressed input is not decoded.
                own = 0 if mode.bits is None else self.input_bytes(block, mode.bits)
                fixed = row.fixed - self.input_bytes(block, 8) + own
                self.rows[block, name] = [Row(fixed, row.stored)]

    def input_bytes(self, block: str, bits: int | None) -> int:
        """Bytes of a checkpointed block's input in `bits` bits, uncompressed if None."""
        candidate = self.block_inputs.get(block)
        return 0 if candidate is None else candidate.bytes(KEEP if bits is None else bits)

    def all(self, choice: int | str, mode: str = STASHES) -> dict[Key, int | str]:
        """The same choice for every candidate, or the same strategy for every block.

        Args:
            choice: choice of every candidate; 8 bits for a candidate that does not have this
                choice.
            mode: strategy of every block. If it is not stash by stash, `choice` is for the
                candidates outside of blocks.

        Returns:
            The choices by key.
        """
        blocks: dict[Key, int | str] = {(b, BLOCK, ""): mode for b in self.simulator.blocks}
        candidates = {
            s.key: choice if choice in s.choices() else 8
            for s in self.candidates
            if mode == STASHES or s.block is None
        }
        return {**candidates, **blocks}

    def _measure_workspace(self, first: Timeline) -> None:
        """Measure the workspace of a real step in 8 bits and of one left to PyTorch."""
        if not self.real:
            return
        runs = StepRunner(self.model, self.inputs, self.autocast, self.loss)
        self.simulator.workspace[False] = runs.workspace(self.base, first)
        plain = PLAIN if not self.simulator.blocks else self.policy(self.all(8, PYTORCH))
        counted = timeline(
            self.model, self.inputs, policy=plain, autocast=self.autocast, loss=self.loss
        )
        try:
            self.simulator.workspace[True] = runs.workspace(plain, counted)
        except torch.OutOfMemoryError:
            self.simulator.workspace[True] = self.simulator.workspace[False]

    def policy(self, choices: Choices) -> Policy:
        """The policy of these choices."""
        return as_policy(self.base, self.candidates, choices, self.siblings)

    def footprint(self, policy: Policy | str) -> Footprint:
        """Count the bytes that a step saves with a policy, on fake tensors."""
        return footprint(
            self.model,
            self.inputs,
            policy=policy,
            autocast=self.autocast,
            fake=True,
            device="cpu",
            loss=self.loss,
        )
