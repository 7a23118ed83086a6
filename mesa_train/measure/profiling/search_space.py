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
        # On a CPU all tensors are in CPU memory. A model on meta is planned for a GPU.
        self.offloadable = device.type in ("meta", "cuda")
        self.strategies = {
            name: strategy
            for name, strategy in STRATEGIES.items()
            if self.offloadable or not strategy.offloaded
        }
        self.base = PRESETS["mesa8"]
        block_names = list(find_blocks(self.model))
        self.simulator = StepSimulator(
            self.model, self.inputs, self.autocast, self.loss, block_names
        )
        stored, first = self.simulator.trace(self.base)
        recompute_linear = dataclasses.replace(self.base, recompute="linear")
        rebuilding, _ = self.simulator.trace(recompute_linear, hold=True)
        uncompressed, _ = self.simulator.trace(dataclasses.replace(self.base, bits=32))
        started = [key[0] for key, *_ in stored.stored if key[1:] == (BLOCK, "begin")]
        single_use = [block for block in block_names if started.count(block) == 1]
        self.candidates = candidates_of(stored, rebuilding, uncompressed, single_use)
        for candidate in self.candidates:
            candidate.offloadable = self.offloadable
        if not self.candidates:
            raise ValueError(
                f"{type(self.model).__name__} saves no tensor of at least {self.base.min_bytes} bytes "
                "with this batch, so there is nothing to choose"
            )
        blocks = {candidate.block for candidate in self.candidates}
        self.simulator.blocks = [block for block in single_use if block in blocks]
        parents = {block.rpartition(".")[0] for block in self.simulator.blocks}
        self.siblings = {
            parent: len(list(self.model.get_submodule(parent).children())) for parent in parents
        }
        self.order = Order.of(stored, self.candidates)
        self._measure_workspace(first)
        stash_order = [key for key, *_ in stored.stored]
        choices = self.all(8)
        self.rows = self.simulator.rows(
            SimulatedStep(choices, self.simulator.with_workspace(first, choices), stash_order),
            self.order,
        )
        self.block_inputs: dict[str, Candidate] = {}
        if self.simulator.blocks:
            self._blocks()

    def _blocks(self) -> None:
        """Simulate steps with all blocks checkpointed, and with all blocks left to PyTorch."""
        blocks = self.simulator.blocks
        log, _ = self.simulator.trace(self.policy(self.all(8, "checkpoint, input 8 bits")))
        self.block_inputs = {
            block: Candidate(
                (block, "checkpoint", "input"), 0, inputs.matrices, inputs.saved_bytes, block=block
            )
            for block, inputs in log.inputs.items()
            if block in blocks
        }
        by_module = self.footprint(self.policy(self.all(8, PYTORCH))).by_module
        for block in blocks:
            sizes = [size for module, size in by_module.items() if block_of(module, [block])]
            self.order.saved_by_block[block, PYTORCH] = sum(sizes)
            for name, strategy in self.strategies.items():
                if strategy.checkpointed:
                    saved = 0 if strategy.offloaded else self.input_bytes(block, strategy.bits)
                    self.order.saved_by_block[block, name] = saved
        for name in (PYTORCH, "checkpoint, input 8 bits", "checkpoint of codes, input 8 bits"):
            choices = self.all(8, name)
            rows = self.simulator.rows(
                self.simulator.simulate(self.policy(choices), choices), self.order
            )
            self.rows |= {part: moments for part, moments in rows.items() if part[0] is not None}
        for block in blocks:
            for name, strategy in self.strategies.items():
                if not strategy.checkpointed or (block, name) in self.rows:
                    continue
                same_kind = "checkpoint of codes" if strategy.codes else "checkpoint"
                row = self.rows[block, f"{same_kind}, input 8 bits"][0]
                # The decoded input exists beside its codes. An uncompressed input is not decoded.
                input_bytes = 0 if strategy.bits is None else self.input_bytes(block, strategy.bits)
                fixed = row.fixed - self.input_bytes(block, 8) + input_bytes
                self.rows[block, name] = [Row(fixed, row.stored)]

    def input_bytes(self, block: str, bits: int | None) -> int:
        """Bytes of a checkpointed block's input in `bits` bits, uncompressed if None."""
        candidate = self.block_inputs.get(block)
        return 0 if candidate is None else candidate.bytes(KEEP if bits is None else bits)

    def all(self, choice: int | str, strategy: str = STASHES) -> dict[Key, int | str]:
        """The same choice for every candidate, or the same strategy for every block.

        Args:
            choice: choice of every candidate; 8 bits for a candidate that does not have this
                choice.
            strategy: strategy of every block. If it is not stash by stash, `choice` is for the
                candidates outside of blocks.

        Returns:
            The choices by key.
        """
        blocks: dict[Key, int | str] = {
            (block, BLOCK, ""): strategy for block in self.simulator.blocks
        }
        candidates = {
            candidate.key: choice if choice in candidate.choices() else 8
            for candidate in self.candidates
            if strategy == STASHES or candidate.block is None
        }
        return {**candidates, **blocks}

    def _measure_workspace(self, first: Timeline) -> None:
        """Measure the workspace of a real step in 8 bits and of one left to PyTorch."""
        if not self.real:
            return
        runner = StepRunner(self.model, self.inputs, self.autocast, self.loss)
        self.simulator.workspace[False] = runner.workspace(self.base, first)
        plain = PLAIN if not self.simulator.blocks else self.policy(self.all(8, PYTORCH))
        counted = timeline(
            self.model, self.inputs, policy=plain, autocast=self.autocast, loss=self.loss
        )
        try:
            self.simulator.workspace[True] = runner.workspace(plain, counted)
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
