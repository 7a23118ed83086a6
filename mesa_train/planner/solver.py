"""Choose for all candidates at once: an integer program that HiGHS solves to a proven gap.

The program minimises time + error_weight * error variance, or the peak. Its constraints are:

- At every moment of the step, the live bytes are at most the budget.
- The added time and the added variance are at most their bounds.
- A candidate is rebuilt only if the Linear that computes it is recomputed.
- The stashes of a block are chosen one by one, unless the block is checkpointed or left to PyTorch.
- The step waits for a transfer to or from CPU memory that is longer than the computation beside it.

`solve` needs highspy, the Python package of HiGHS; the extra `plan` installs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mesa_train.measure.profiling.blocks import STASHES, Block
from mesa_train.measure.profiling.candidates import REBUILD, Candidate, first_in_flight
from mesa_train.measure.stash_log import BLOCK, Key

# Objectives.
COST, PEAK = "cost", "peak"
# Bytes of a unit of memory in the program, so that its rows are of one magnitude.
_UNIT = 2.0**20
# highspy's SolutionStatus.kSolutionStatusFeasible.
_FEASIBLE = 2
# The name of a variable: a choice of a candidate or block, a recomputed Linear, or both together.
_Name = tuple[Key, int | str] | tuple[Key, int | str, str] | str


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


def solve(
    problem: Problem,
    *,
    budget: float | None = None,
    max_seconds: float | None = None,
    max_variance: float | None = None,
    objective: str = COST,
    error_weight: float = 0.0,
    limit_s: float = 20.0,
) -> Solution | None:
    """Find the best choices.

    Args:
        problem: the candidates and blocks, with their costs.
        budget: most live bytes at any moment; None for no bound.
        max_seconds: most seconds of all choices together; None for no bound.
        max_variance: most variance of all choices together; None for no bound.
        objective: COST minimises seconds + error_weight * variance; PEAK minimises the peak.
        error_weight: seconds that a variance of one costs.
        limit_s: seconds after which HiGHS returns the best choices so far.

    Returns:
        The solution; None if no choices are within the bounds.

    Raises:
        ImportError: highspy is not installed; the message names the extra.
    """
    highs = _quiet_highs()
    if budget is not None and budget < 0:
        return None
    highs.setOptionValue("time_limit", limit_s)
    highs.setOptionValue("mip_rel_gap", 1e-3)
    program = _Program(problem, highs)
    if budget is not None:
        highs.addConstr(program.peak <= budget / _UNIT)
    if max_seconds is not None:
        highs.addConstr(program.sum(program.seconds) + 1e-3 * program.wait_ms <= max_seconds)
    if max_variance is not None:
        # The factor 1e3 is needed because the tolerances of HiGHS are absolute.
        highs.addConstr(1e3 * program.sum(program.variance) <= 1e3 * max_variance)
    highs.minimize(program.objective(objective, error_weight))
    info = highs.getInfo()
    if info.primal_solution_status != _FEASIBLE:
        return None
    values = highs.vals(program.binaries)
    choices = {
        key: max(options, key=lambda c: values[key, c])
        for key, options in problem.choices().items()
    }
    for candidate in problem.candidates:
        name = candidate.block
        if name is not None and choices.get((name, BLOCK, ""), STASHES) != STASHES:
            del choices[candidate.key]
    # HiGHS reports an infinite gap for a program without binaries.
    return score(problem, choices, info.mip_gap if program.binaries else 0.0)


def _quiet_highs() -> Any:
    """Make a HiGHS that prints nothing, because stdout is for results."""
    try:
        import highspy
    except ImportError as error:
        raise ImportError("planning needs highspy: pip install 'mesa_train[plan]'") from error

    class Quiet(highspy.Highs):
        # HiGHS prints a banner in this method, which the constructor calls before options are set.
        def enableCallbacks(self) -> None:
            self.silent()
            super().enableCallbacks()

    highs = Quiet()
    highs.silent()
    return highs


class _Program:
    """The variables and the constraints of a problem in HiGHS.

    Attributes:
        binaries: the 0-1 variables, by name.
        seconds: factor of each binary in the sum of seconds, by name.
        variance: factor of each binary in the sum of variances, by name.
        peak: most live bytes of all moments, in MiB.
        wait_ms: milliseconds that a step waits for the link to CPU memory.
    """

    def __init__(self, problem: Problem, highs: Any) -> None:
        self.highs = highs
        linears = list(
            dict.fromkeys(
                candidate.product for candidate in problem.candidates if candidate.product
            )
        )
        coupled = {key: variance for key, variance in problem.coupled.items() if variance > 0}
        couplings = _couplings(problem, coupled)
        choices = [
            (key, choice) for key, options in problem.choices().items() for choice in options
        ]
        self.binaries = highs.addBinaries([*choices, *linears, *couplings])
        self.peak = highs.addVariable()
        self.wait_ms: Any = 0.0
        self.seconds: dict[_Name, float] = {linear: problem.matmul_s[linear] for linear in linears}
        self.variance: dict[_Name, float] = {
            coupling: coupled[coupling[0], coupling[1]] for coupling in couplings
        }
        is_on = self.binaries
        blocks: dict[str | None, Key] = {block.name: block.key for block in problem.blocks}
        for block in problem.blocks:
            options = [STASHES, *block.options]
            highs.addConstr(highs.qsum(is_on[block.key, strategy] for strategy in options) == 1)
            for strategy, option in block.options.items():
                self.seconds[block.key, strategy] = option.seconds
                self.variance[block.key, strategy] = option.variance
        for candidate in problem.candidates:
            key, linear = candidate.key, candidate.product
            in_block = candidate.block in blocks
            count = is_on[blocks[candidate.block], STASHES] if in_block else 1
            highs.addConstr(
                highs.qsum(is_on[key, choice] for choice in candidate.choices()) == count
            )
            if linear:
                highs.addConstr(is_on[key, REBUILD] <= is_on[linear])
            for choice in candidate.choices():
                self.seconds[key, choice] = problem.seconds[key, choice]
                self.variance[key, choice] = problem.variance[key, choice]
        for key, choice, linear in couplings:
            # The choice and the recomputed Linear add the coupled variance only together.
            joint = is_on[key, choice, linear]
            highs.addConstr(is_on[key, choice] + is_on[linear] <= 1 + joint)
        for fixed, sizes in _moments(problem):
            highs.addConstr((fixed + self.sum(sizes)) * (1 / _UNIT) <= self.peak)
        if problem.host_link is not None:
            self._add_host_link(problem.offloaded(), problem.host_link)

    def sum(self, factors: Mapping[Any, float]) -> Any:
        """Return the sum of factor * binary."""
        return self.highs.qsum(factor * self.binaries[name] for name, factor in factors.items())

    def _add_host_link(
        self, offloaded: Mapping[tuple[Key, int | str], float], host_link: HostLink
    ) -> None:
        """Add the wait of the forward, the wait of the backward and the limit of CPU memory."""
        total = self.sum(offloaded)
        for hidden_s in (host_link.forward_s, host_link.backward_s):
            wait = self.highs.addVariable()
            self.highs.addConstr(1e3 / host_link.bytes_per_s * total <= 1e3 * hidden_s + wait)
            self.wait_ms = self.wait_ms + wait
        if host_link.capacity is not None:
            self.highs.addConstr(total * (1 / _UNIT) <= host_link.capacity / _UNIT)

    def objective(self, kind: str, error_weight: float) -> Any:
        """Return the expression to minimise. Its last term is small and only breaks ties."""
        if kind == PEAK:
            scale = 1e-3 / (sum(map(abs, self.seconds.values())) or 1.0)
            return self.peak + scale * (self.sum(self.seconds) + 1e-3 * self.wait_ms)
        # Each binary has one factor, because highspy loses digits when it adds several factors.
        cost = {
            name: 1e3 * (self.seconds.get(name, 0.0) + error_weight * self.variance.get(name, 0.0))
            for name in self.binaries
        }
        return self.sum(cost) + self.wait_ms + 1e-6 * self.peak


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
        for fixed, row in _moments(problem)
    )
    return Solution(dict(choices), peak, seconds, variance, gap)


def _couplings(
    problem: Problem, coupled: Mapping[tuple[Key, int | str], float]
) -> list[tuple[Key, int | str, str]]:
    """List (source, its choice, the Linear recomputed from it) for every coupled variance."""
    pairs = {
        (candidate.source, candidate.product)
        for candidate in problem.candidates
        if candidate.product and candidate.source is not None
    }
    return [
        (key, choice, product)
        for key, choice in coupled
        for source, product in sorted(pairs)
        if source == key
    ]


def _moments(problem: Problem) -> list[tuple[float, dict[tuple[Key, int | str], float]]]:
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
