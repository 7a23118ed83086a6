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
from .candidates import Candidate, under_way

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
        kept: bytes saved of a block under a strategy other than stash by stash, by (block,
            strategy).
    """

    entries: list[tuple[Key, float]]
    candidates: Mapping[Key, Candidate]
    kept: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, watch: StashLog, candidates: Sequence[Candidate]) -> Order:
        """The order of a forward that stores all candidates."""
        by_key = {candidate.key: candidate for candidate in candidates}
        entries = [
            (key, 0.0 if matrix is None else matrix[0] * matrix[1] / by_key[key].elements)
            for key, _, matrix in watch.stored
        ]
        return cls(entries, by_key)

    def begins(self, block: str) -> int:
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
                mode = str(choices.get((key[0], BLOCK, ""), STASHES))
                size = self.kept.get((key[0], mode), 0) if key[2] == "begin" else 0
            elif key in choices:
                size = share * self.candidates[key].bytes(choices[key])
            sums.append(sums[-1] + size)
            away = key in choices and key[1] != BLOCK
            offloaded.append(
                share * self.candidates[key].offloaded_bytes(choices[key]) if away else 0.0
            )
        begins = [under_way(self.entries, stored) for stored in range(len(sums))]
        return [
            size + sum(offloaded[begin + 1 : stored + 1])
            for stored, (size, begin) in enumerate(zip(sums, begins, strict=True))
        ]

    def places(self, order: Sequence[Key]) -> list[int]:
        """Find the stashes of another forward among the entries.

        Args:
            order: keys of the stashes that the forward stored.

        Returns:
            For each stash, the number of entries before it; at the end, the number of all entries.
        """
        found, start = [], 0
        for key in order:
            place = next(
                (i for i in range(start, len(self.entries)) if self.entries[i][0] == key), None
            )
            if place is None:
                # Stored under this policy alone: part of the working set.
                found.append(start)
                continue
            found.append(place)
            start = place + 1
        return [*found, len(self.entries)]


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

    def watch(self, policy: Policy, holding: bool = False) -> tuple[StashLog, Timeline]:
        """Count a step with `policy`.

        Args:
            policy: the policy.
            holding: hold the stashes, see `StashLog`.

        Returns:
            (its stashes, its timeline without workspace).
        """
        watch = StashLog(holding, self.blocks)
        played = timeline(
            self.model,
            self.inputs,
            policy=policy,
            autocast=self.autocast,
            loss=self.loss,
            log=watch,
        )
        return watch, played

    def simulated(self, policy: Policy, choices: Choices) -> SimulatedStep:
        """Simulate a step with the `policy` of these `choices`, workspace included."""
        watch, counted = self.watch(policy)
        return SimulatedStep(
            choices, self.whole(counted, choices), [key for key, *_ in watch.stored]
        )

    def whole(self, counted: Timeline, choices: Choices) -> Timeline:
        """Add the workspace, which fake tensors do not show, to a timeline."""
        moments = []
        for moment in counted.moments:
            block = block_of(moment.module, self.blocks)
            mode = choices.get((block or "", BLOCK, ""), STASHES)
            plain = mode != STASHES and not STRATEGIES[str(mode)].codes
            more = self.workspace.get(plain, {}).get((moment.phase, moment.module), 0)
            moments.append(dataclasses.replace(moment, peak_bytes=moment.peak_bytes + more))
        return dataclasses.replace(counted, moments=tuple(moments))

    def rows(self, simulated: SimulatedStep, order: Order) -> dict[Part, list[Row]]:
        """The moments of a simulated step, by the part of the model that they belong to."""
        sums, places = order.bytes(simulated.choices), order.places(simulated.order)
        found: dict[Part, list[Row]] = {}
        for moment in simulated.timeline.moments:
            block = block_of(moment.module, self.blocks)
            if block is None:
                part: Part = (None, None)
                stored = places[moment.stored]
            else:
                mode = str(simulated.choices.get((block, BLOCK, ""), STASHES))
                part = (block, mode)
                stored = places[moment.stored] if mode == STASHES else order.begins(block)
            row = Row(moment.peak_bytes - sums[stored], stored)
            rows = found.setdefault(part, [])
            if part[1] in (None, STASHES) or not rows:
                rows.append(row)
            elif row.fixed > rows[0].fixed:
                rows[0] = row
        return found
