"""StepSimulator: a step with a policy on tensors without data, as rows of the planner's program.

A policy's timeline says how many bytes are live at every moment. Those of the stashes that stand then
are known by choice; what remains is the working set of that moment, which the program takes to be the
same for other choices near by. Where a block is checkpointed or left to PyTorch, all of it is one
moment: the highest.
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
# (block, mode), or (None, None) outside of blocks.
Part = tuple[str | None, str | None]


class Row(NamedTuple):
    """A moment: bytes live beyond those of the first `stored` entries of the order."""

    fixed: float
    stored: int


@dataclasses.dataclass
class Order:
    """entries: the candidates of all stashes in the order of the forward, each with its share of its candidate's
    bytes, and the keys of where blocks begin and end. candidates: by key. kept: bytes of a block in a mode
    other than stash by stash."""

    entries: list[tuple[Key, float]]
    candidates: Mapping[Key, Candidate]
    kept: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, watch: StashLog, candidates: Sequence[Candidate]) -> Order:
        """The order of a forward that stores all there is."""
        by_key = {candidate.key: candidate for candidate in candidates}
        entries = [
            (key, 0.0 if matrix is None else matrix[0] * matrix[1] / by_key[key].elements)
            for key, _, matrix in watch.stored
        ]
        return cls(entries, by_key)

    def begins(self, block: str) -> int:
        """How many entries come before a block."""
        return next(i for i, (key, _) in enumerate(self.entries) if key == (block, BLOCK, "begin"))

    def bytes(self, choices: Choices) -> list[float]:
        """Bytes of the first 0, 1, 2... entries under these choices, with what is on its way to main
        memory or back."""
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
        """For a forward that stored `order`: after how many entries each of its stashes comes, and
        last of all the end."""
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
    """Choices, the timeline of a step with them, and the stashes in the order that they were made."""

    choices: Choices
    timeline: Timeline
    order: list[Key]


class StepSimulator:
    """Steps of one model and batch.

    workspace: of blocks that keep codes, and of those that are left to PyTorch (False, True).
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
        """A step with `policy`, its stashes and its timeline as counted."""
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
        """A step with the `policy` of these `choices`, workspace included."""
        watch, counted = self.watch(policy)
        return SimulatedStep(
            choices, self.whole(counted, choices), [key for key, *_ in watch.stored]
        )

    def whole(self, counted: Timeline, choices: Choices) -> Timeline:
        """A timeline with the workspace that counting does not show."""
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
