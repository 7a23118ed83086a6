"""The planner's integer program as data: choices with their costs, bounds, and a solution.

`score` computes the peak, seconds and variance of any set of choices. `solver.py` finds the best
set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mesa_train.measure.profiling.blocks import STASHES, Block
from mesa_train.measure.profiling.candidates import REBUILD, Candidate, first_in_flight
from mesa_train.measure.stash_log import BLOCK, Key


class Moment(NamedTuple):
    """The live bytes of one moment of the step, without the bytes of the stashes.

    Args:
        fixed: live bytes beside the first `stored` stashes.
        stored: number of stashes that exist.
        block: name of the block that runs, or None.
        strategy: the moment exists only if the block has this strategy; None for every strategy.
    """

    fixed: float
    stored: int
    block: str | None = None
    strategy: str | None = None


class HostLink(NamedTuple):
    """The link between the device and CPU memory.

    Args:
        bytes_per_s: bandwidth in each direction.
        forward_s: seconds of computation that overlap with copies to CPU memory.
        backward_s: seconds of computation that overlap with copies back.
        capacity: most bytes in CPU memory at once; None for no limit.
    """

    bytes_per_s: float
    forward_s: float
    backward_s: float
    capacity: int | None = None

    def waits(self, offloaded_bytes: float) -> float:
        """Return the seconds that a step waits for the copies of `offloaded_bytes` both ways."""
        copy_s = offloaded_bytes / self.bytes_per_s
        return max(0.0, copy_s - self.forward_s) + max(0.0, copy_s - self.backward_s)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The choices and their costs.

    Args:
        candidates: the saved tensors to choose for.
        seconds: seconds that a choice adds to the step, by (candidate, choice).
        variance: squared relative gradient error that a choice adds, by (candidate, choice).
        matmul_s: seconds to recompute a Linear, by its name.
        coupled: variance that the choice of a source adds if a candidate is rebuilt from the
            source, by (source, choice).
        moments: the live bytes of each moment, without the stashes.
        order: (candidate, share of the candidate's bytes) of every stash, in the order of the
            forward. (block, BLOCK, "begin") is the entry before a block.
        blocks: the blocks, with the costs of each strategy.
        host_link: the link to CPU memory; None offloads nothing.
    """

    candidates: Sequence[Candidate]
    seconds: Mapping[tuple[Key, int | str], float]
    variance: Mapping[tuple[Key, int | str], float]
    matmul_s: Mapping[str, float]
    coupled: Mapping[tuple[Key, int | str], float]
    moments: Sequence[Moment]
    order: Sequence[tuple[Key, float]]
    blocks: Sequence[Block] = ()
    host_link: HostLink | None = None

    def offloaded(self) -> dict[tuple[Key, int | str], float]:
        """Return the offloaded bytes by (candidate or block, choice), of offloaded choices alone."""
        candidates = {
            (candidate.key, choice): float(candidate.offloaded_bytes(choice))
            for candidate in self.candidates
            for choice in candidate.choices()
        }
        blocks = {
            (block.key, name): float(option.offloaded_bytes)
            for block in self.blocks
            for name, option in block.options.items()
        }
        return {choice: size for choice, size in (candidates | blocks).items() if size}

    def choices(self) -> dict[Key, list[int | str]]:
        """Return the choices of every candidate and block, by key."""
        by_candidate = {candidate.key: candidate.choices() for candidate in self.candidates}
        return by_candidate | {block.key: [STASHES, *block.options] for block in self.blocks}


@dataclasses.dataclass(frozen=True)
class Solution:
    """The solution of a problem.

    Args:
        choices: the choice of each candidate and block, by key. Candidates of a block have a choice
            only if the block's strategy is stash by stash.
        peak_bytes: most live bytes of all moments.
        seconds: seconds that the choices add to the step.
        variance: squared relative gradient error that the choices add.
        gap: proven bound on the distance from the optimum, relative to the optimum.
    """

    choices: dict[Key, int | str]
    peak_bytes: float
    seconds: float
    variance: float
    gap: float

    def cost(self, error_weight: float) -> float:
        """Return seconds + error_weight * variance."""
        return self.seconds + error_weight * self.variance

    def within(self, max_seconds: float | None, max_variance: float | None) -> bool:
        """True if seconds and variance are at most these bounds; None is no bound."""
        return (max_seconds is None or self.seconds <= max_seconds) and (
            max_variance is None or self.variance <= max_variance
        )


def score(problem: Problem, choices: Mapping[Key, int | str], gap: float = 0.0) -> Solution:
    """Compute the peak, seconds and variance of a set of choices.

    Args:
        problem: the candidates and blocks, with their costs.
        choices: the choice of each candidate and block, by key.
        gap: gap of the solution.
    """
    chosen = [candidate for candidate in problem.candidates if candidate.key in choices]
    linears = {
        candidate.product
        for candidate in chosen
        if candidate.product and choices[candidate.key] == REBUILD
    }
    seconds = sum(problem.seconds[candidate.key, choices[candidate.key]] for candidate in chosen)
    seconds += sum(problem.matmul_s[linear] for linear in linears if linear)
    variance = sum(problem.variance[candidate.key, choices[candidate.key]] for candidate in chosen)
    sources = {
        candidate.source
        for candidate in chosen
        if candidate.source and choices[candidate.key] == REBUILD
    }
    variance += sum(
        problem.coupled.get((key, choices[key]), 0.0)
        for key in sources
        if key is not None and key in choices
    )
    for block in problem.blocks:
        option = block.options.get(str(choices.get(block.key, STASHES)))
        if option is not None:
            seconds, variance = seconds + option.seconds, variance + option.variance
    if problem.host_link is not None:
        offloaded = problem.offloaded()
        seconds += problem.host_link.waits(
            sum(offloaded.get(item, 0.0) for item in choices.items())
        )
    names = dict.fromkeys(choices.items(), 1.0)
    peak = max(
        fixed + sum(size for name, size in row.items() if name in names)
        for fixed, row in rows_of_moments(problem)
    )
    return Solution(dict(choices), peak, seconds, variance, gap)


def rows_of_moments(problem: Problem) -> list[tuple[float, dict[tuple[Key, int | str], float]]]:
    """List (fixed bytes, bytes by (candidate or block, choice)) of the moments.

    Of the moments with the same live stashes, only the highest is listed.
    """
    highest: dict[tuple[int, str | None, str | None], float] = {}
    for moment in problem.moments:
        stashes = (moment.stored, moment.block, moment.strategy)
        highest[stashes] = max(moment.fixed, highest.get(stashes, -math.inf))
    candidates = {candidate.key: candidate for candidate in problem.candidates}
    blocks = {block.name: block for block in problem.blocks}
    moments = []
    for (stored, name, strategy), fixed in highest.items():
        row: dict[tuple[Key, int | str], float] = {}
        in_flight_from = first_in_flight(problem.order, stored)
        for index, (key, share) in enumerate(problem.order[:stored]):
            if key[1] == BLOCK:
                if key[2] == "begin" and key[0] in blocks:
                    block = blocks[key[0]]
                    row |= {
                        (block.key, label): float(option.saved_bytes)
                        for label, option in block.options.items()
                    }
                continue
            for choice in candidates[key].choices():
                live = candidates[key].bytes(choice)
                if index >= in_flight_from:
                    live += candidates[key].offloaded_bytes(choice)
                size = share * live
                if size:
                    row[key, choice] = row.get((key, choice), 0.0) + size
        if name in blocks and strategy is not None:
            # The fixed bytes exist only if the block has this strategy.
            variable = (blocks[name].key, strategy)
            row[variable] = row.get(variable, 0.0) + fixed
            fixed = 0.0
        moments.append((fixed, row))
    return moments
