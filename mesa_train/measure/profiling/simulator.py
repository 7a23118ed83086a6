"""Simulate a step with a policy on fake tensors, as rows of the planner's integer program.

The timeline of a policy has the live bytes of every moment. The choices give the bytes of the
stashes that exist at that moment. The other bytes are the working set of the moment; the program
assumes the same working set for other choices near by. A block that is checkpointed or left to
PyTorch is one moment: its highest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mesa_train.measure.peak import Workspace
from mesa_train.measure.stash_log import BLOCK, Key, StashLog
from mesa_train.measure.timeline import Timeline, timeline
from mesa_train.policy import Policy

from .blocks import STASHES, STRATEGIES, block_of
from .candidates import Candidate, first_in_flight

Choices = Mapping[Key, int | str]
# (block, strategy), or (None, None) outside of blocks.
Part = tuple[str | None, str | None]


class Row(NamedTuple):
    """A moment of a simulated step.

    Args:
        fixed: bytes live beyond the bytes of the first `stored` entries of the order.
        stored: number of entries of the order that exist.
    """

    fixed: float
    stored: int


@dataclasses.dataclass
class Order:
    """The stashes of a forward in order.

    Args:
        entries: (key, share) of all stashes, the share being a part of its candidate's bytes. Keys
            of blocks show where a block begins and ends; their share is 0.
        candidates: by key.
        saved_by_block: bytes that a block saves under a strategy other than stash by stash, by
            (block, strategy).
    """

    entries: list[tuple[Key, float]]
    candidates: Mapping[Key, Candidate]
    saved_by_block: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, log: StashLog, candidates: Sequence[Candidate]) -> Order:
        """The order of a forward that stores all candidates."""
        by_key = {candidate.key: candidate for candidate in candidates}
        entries = [
            (key, 0.0 if matrix is None else matrix[0] * matrix[1] / by_key[key].elements)
            for key, _, matrix in log.stored
        ]
        return cls(entries, by_key)

    def block_start(self, block: str) -> int:
        """Number of entries before a block."""
        return next(i for i, (key, _) in enumerate(self.entries) if key == (block, BLOCK, "begin"))

    def bytes(self, choices: Choices) -> list[float]:
        """Bytes on the device of the first 0, 1, 2... entries under these choices.

        They include offloaded stashes that are being copied to CPU memory or back.
        """
        sums, offloaded = [0.0], [0.0]
        for key, share in self.entries:
            size = 0.0
            if key[1] == BLOCK:
                strategy = str(choices.get((key[0], BLOCK, ""), STASHES))
                size = self.saved_by_block.get((key[0], strategy), 0) if key[2] == "begin" else 0
            elif key in choices:
                size = share * self.candidates[key].bytes(choices[key])
            sums.append(sums[-1] + size)
            is_offloaded = key in choices and key[1] != BLOCK
            offloaded.append(
                share * self.candidates[key].offloaded_bytes(choices[key]) if is_offloaded else 0.0
            )
        in_flight_from = [first_in_flight(self.entries, stored) for stored in range(len(sums))]
        return [
            size + sum(offloaded[start + 1 : stored + 1])
            for stored, (size, start) in enumerate(zip(sums, in_flight_from, strict=True))
        ]

    def positions(self, order: Sequence[Key]) -> list[int]:
        """Find the stashes of another forward among the entries.

        Args:
            order: keys of the stashes that the forward stored.

        Returns:
            For each stash, the number of entries before it; at the end, the number of all entries.
        """
        positions, start = [], 0
        for key in order:
            position = next(
                (i for i in range(start, len(self.entries)) if self.entries[i][0] == key), None
            )
            if position is None:
                # Only this policy stores the stash, so it counts as working set.
                positions.append(start)
                continue
            positions.append(position)
            start = position + 1
        return [*positions, len(self.entries)]


class SimulatedStep(NamedTuple):
    """A step on fake tensors.

    Args:
        choices: the choices of the step.
        timeline: its timeline.
        order: keys of its stashes, in the order of the forward.
    """

    choices: Choices
    timeline: Timeline
    order: list[Key]


class StepSimulator:
    """Simulates steps of one model and batch.

    The attribute `workspace` has the workspace of blocks that save codes (False) and of blocks that
    are left to PyTorch (True).

    Args:
        model: the module.
        inputs: as for `footprint`.
        autocast: the dtype of autocast; None runs without autocast.
        loss: from the output to a scalar.
        blocks: qualified names of the blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        autocast: Any,
        loss: Callable[[Any], Tensor],
        blocks: Sequence[str],
    ) -> None:
        self.model, self.inputs, self.autocast, self.loss = model, inputs, autocast, loss
        self.blocks = list(blocks)
        self.workspace: dict[bool, Workspace] = {}

    def trace(self, policy: Policy, hold: bool = False) -> tuple[StashLog, Timeline]:
        """Run a step with `policy` on fake tensors.

        Args:
            policy: the policy.
            hold: keep the stashes alive, see `StashLog`.

        Returns:
            (its stashes, its timeline without workspace).
        """
        log = StashLog(hold, self.blocks)
        counted = timeline(
            self.model,
            self.inputs,
            policy=policy,
            autocast=self.autocast,
            loss=self.loss,
            log=log,
        )
        return log, counted

    def simulate(self, policy: Policy, choices: Choices) -> SimulatedStep:
        """Simulate a step with the `policy` of these `choices`, workspace included."""
        log, counted = self.trace(policy)
        return SimulatedStep(
            choices, self.with_workspace(counted, choices), [key for key, *_ in log.stored]
        )

    def with_workspace(self, counted: Timeline, choices: Choices) -> Timeline:
        """Add the workspace, which fake tensors do not show, to a timeline."""
        moments = []
        for moment in counted.moments:
            block = block_of(moment.module, self.blocks)
            strategy = choices.get((block or "", BLOCK, ""), STASHES)
            plain = strategy != STASHES and not STRATEGIES[str(strategy)].codes
            workspace = self.workspace.get(plain, {}).get((moment.phase, moment.module), 0)
            moments.append(dataclasses.replace(moment, peak_bytes=moment.peak_bytes + workspace))
        return dataclasses.replace(counted, moments=tuple(moments))

    def rows(self, step: SimulatedStep, order: Order) -> dict[Part, list[Row]]:
        """The moments of a simulated step, by the part of the model that they belong to."""
        sums, positions = order.bytes(step.choices), order.positions(step.order)
        by_part: dict[Part, list[Row]] = {}
        for moment in step.timeline.moments:
            block = block_of(moment.module, self.blocks)
            if block is None:
                part: Part = (None, None)
                stored = positions[moment.stored]
            else:
                strategy = str(step.choices.get((block, BLOCK, ""), STASHES))
                part = (block, strategy)
                stored = (
                    positions[moment.stored] if strategy == STASHES else order.block_start(block)
                )
            row = Row(moment.peak_bytes - sums[stored], stored)
            rows = by_part.setdefault(part, [])
            if part[1] in (None, STASHES) or not rows:
                rows.append(row)
            elif row.fixed > rows[0].fixed:
                rows[0] = row
        return by_part
