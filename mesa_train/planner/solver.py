"""The choice for every candidate at once: an integer program, solved by HiGHS to a proven gap.

The program minimises time + price * error variance, or the peak. Its constraints are:

- At every moment of the step, the live bytes are at most the budget.
- The added time and the added variance are at most their bounds.
- A candidate is rebuilt only if the matmul that makes it is repeated.
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
from mesa_train.measure.profiling.candidates import REBUILD, Candidate, under_way
from mesa_train.measure.stash_log import BLOCK, Key

# Objectives.
COST, PEAK = "cost", "peak"
# Bytes of a unit of memory in the program, so that its rows are of one magnitude.
_UNIT = 2.0**20
# highspy's SolutionStatus.kSolutionStatusFeasible.
_FEASIBLE = 2
# The variable of a candidate's or block's choice, of a repeated matmul, or of both together.
_Name = tuple[Key, int | str] | tuple[Key, int | str, str] | str


class Moment(NamedTuple):
    """Bytes live beyond those of the first `stored` stashes, where `block` is in `mode` (None:
    whatever is chosen)."""

    fixed: float
    stored: int
    block: str | None = None
    mode: str | None = None


class HostLink(NamedTuple):
    """The way to CPU memory. forward_s, backward_s: of arithmetic that hides what goes out, and what
    comes back. room: most bytes there at once, None for any."""

    bytes_per_s: float
    forward_s: float
    backward_s: float
    room: int | None = None

    def waits(self, offloaded_bytes: float) -> float:
        """Seconds that a step waits for so many bytes."""
        taken = offloaded_bytes / self.bytes_per_s
        return max(0.0, taken - self.forward_s) + max(0.0, taken - self.backward_s)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The choices and their costs.

    seconds, variance: by candidate and choice; the variance is of the gradient, relative to its square.
    matmul_s: seconds of repeating a product. coupled: variance that a choice of a source adds if
    something is rebuilt from it. moments: when how much is live. order: the candidates of the stashes
    that the forward stores, each with its share of the candidate's bytes; (block, BLOCK, "begin") stands
    where a block begins. host_link: where stashes may be offloaded.
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
        """Bytes that go to CPU memory, by candidate or block and choice, of those that do."""
        candidates = {
            (s.key, c): float(s.offloaded_bytes(c)) for s in self.candidates for c in s.choices()
        }
        blocks = {
            (b.key, m): float(w.offloaded_bytes) for b in self.blocks for m, w in b.options.items()
        }
        return {name: size for name, size in (candidates | blocks).items() if size}

    def choices(self) -> dict[Key, list[int | str]]:
        """The choices of every candidate and block."""
        found = {s.key: s.choices() for s in self.candidates}
        return found | {b.key: [STASHES, *b.options] for b in self.blocks}


@dataclasses.dataclass(frozen=True)
class Solution:
    """choices: by candidate and block; none for the candidates of a block that are not chosen one by one.
    peak_bytes: of the moments as given. seconds, variance: of the choices. gap: how far from the
    optimum it may be, relative to it."""

    choices: dict[Key, int | str]
    peak_bytes: float
    seconds: float
    variance: float
    gap: float

    def cost(self, price: float) -> float:
        """Seconds, and variance at `price` seconds a unit."""
        return self.seconds + price * self.variance

    def within(self, max_seconds: float | None, max_variance: float | None) -> bool:
        """True if it stays within the bounds, of which None is none."""
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
    price: float = 0.0,
    limit_s: float = 20.0,
) -> Solution | None:
    """The best choices, or None if no choices are within the bounds.

    Args:
        problem: the candidates and blocks, with their costs.
        budget: the most bytes live at any moment; None for any number.
        max_seconds: the most seconds of all choices together; None for any number.
        max_variance: the most variance of all choices together; None for any.
        objective: COST minimises seconds and priced variance, PEAK the highest moment.
        price: seconds that a unit of variance is worth.
        limit_s: seconds after which HiGHS returns the best choices that it has.

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
        # Scaled up, because the tolerances of HiGHS are absolute.
        highs.addConstr(1e3 * program.sum(program.variance) <= 1e3 * max_variance)
    highs.minimize(program.objective(objective, price))
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
    # Without binaries there is no gap, and HiGHS reports infinity.
    return score(problem, choices, info.mip_gap if program.binaries else 0.0)


def _quiet_highs() -> Any:
    """HiGHS without output: stdout is for results."""
    try:
        import highspy
    except ImportError as error:
        raise ImportError("planning needs highspy: pip install 'mesa_train[plan]'") from error

    class Quiet(highspy.Highs):
        # The constructor calls it, and would print a banner before any option could be set.
        def enableCallbacks(self) -> None:
            self.silent()
            super().enableCallbacks()

    highs = Quiet()
    highs.silent()
    return highs


class _Program:
    """The variables and the constraints of a problem in HiGHS.

    binaries: 0 or 1 by name. seconds, variance: the factors of binaries in the two sums. peak: MiB of
    the highest moment. wait_ms: milliseconds that a step waits for the link to CPU memory.
    """

    def __init__(self, problem: Problem, highs: Any) -> None:
        self.highs = highs
        linears = list(dict.fromkeys(s.product for s in problem.candidates if s.product))
        coupled = {k: v for k, v in problem.coupled.items() if v > 0}
        links = _links(problem, coupled)
        choices = [(k, c) for k, options in problem.choices().items() for c in options]
        self.binaries = highs.addBinaries([*choices, *linears, *links])
        self.peak = highs.addVariable()
        self.wait_ms: Any = 0.0
        self.seconds: dict[_Name, float] = {p: problem.matmul_s[p] for p in linears}
        self.variance: dict[_Name, float] = {link: coupled[link[0], link[1]] for link in links}
        is_on = self.binaries
        blocks: dict[str | None, Key] = {block.name: block.key for block in problem.blocks}
        for block in problem.blocks:
            options = [STASHES, *block.options]
            highs.addConstr(highs.qsum(is_on[block.key, m] for m in options) == 1)
            for mode, option in block.options.items():
                self.seconds[block.key, mode] = option.seconds
                self.variance[block.key, mode] = option.variance
        for candidate in problem.candidates:
            key, linear = candidate.key, candidate.product
            in_block = candidate.block in blocks
            count = is_on[blocks[candidate.block], STASHES] if in_block else 1
            highs.addConstr(highs.qsum(is_on[key, c] for c in candidate.choices()) == count)
            if linear:
                highs.addConstr(is_on[key, REBUILD] <= is_on[linear])
            for choice in candidate.choices():
                self.seconds[key, choice] = problem.seconds[key, choice]
                self.variance[key, choice] = problem.variance[key, choice]
        for key, choice, linear in links:
            # The coupled variance comes with the choice and the repeated matmul together.
            both = is_on[key, choice, linear]
            highs.addConstr(is_on[key, choice] + is_on[linear] <= 1 + both)
        for fixed, sizes in _moments(problem):
            highs.addConstr((fixed + self.sum(sizes)) * (1 / _UNIT) <= self.peak)
        if problem.host_link is not None:
            self._add_host_link(problem.offloaded(), problem.host_link)

    def sum(self, factors: Mapping[Any, float]) -> Any:
        """The sum of binaries, each times its factor."""
        return self.highs.qsum(factor * self.binaries[name] for name, factor in factors.items())

    def _add_host_link(
        self, offloaded: Mapping[tuple[Key, int | str], float], host_link: HostLink
    ) -> None:
        """Add the waits of forward and backward, and the limit of CPU memory."""
        total = self.sum(offloaded)
        for hidden_s in (host_link.forward_s, host_link.backward_s):
            wait = self.highs.addVariable()
            self.highs.addConstr(1e3 / host_link.bytes_per_s * total <= 1e3 * hidden_s + wait)
            self.wait_ms = self.wait_ms + wait
        if host_link.room is not None:
            self.highs.addConstr(total * (1 / _UNIT) <= host_link.room / _UNIT)

    def objective(self, kind: str, price: float) -> Any:
        """The expression to minimise; its last term, a thousandth or less, only breaks ties."""
        if kind == PEAK:
            scale = 1e-3 / (sum(map(abs, self.seconds.values())) or 1.0)
            return self.peak + scale * (self.sum(self.seconds) + 1e-3 * self.wait_ms)
        # One factor a binary: highspy loses digits where it adds up several.
        cost = {
            name: 1e3 * (self.seconds.get(name, 0.0) + price * self.variance.get(name, 0.0))
            for name in self.binaries
        }
        return self.sum(cost) + self.wait_ms + 1e-6 * self.peak


def score(problem: Problem, choices: Mapping[Key, int | str], gap: float = 0.0) -> Solution:
    """The cost of a set of choices in a problem."""
    own = [candidate for candidate in problem.candidates if candidate.key in choices]
    repeated = {s.product for s in own if s.product and choices[s.key] == REBUILD}
    seconds = sum(problem.seconds[s.key, choices[s.key]] for s in own)
    seconds += sum(problem.matmul_s[p] for p in repeated if p)
    variance = sum(problem.variance[s.key, choices[s.key]] for s in own)
    feeding = {s.source for s in own if s.source and choices[s.key] == REBUILD}
    variance += sum(
        problem.coupled.get((k, choices[k]), 0.0) for k in feeding if k is not None and k in choices
    )
    for block in problem.blocks:
        option = block.options.get(str(choices.get(block.key, STASHES)))
        if option is not None:
            seconds, variance = seconds + option.seconds, variance + option.variance
    if problem.host_link is not None:
        offloaded = problem.offloaded()
        seconds += problem.host_link.waits(
            sum(offloaded.get(chosen, 0.0) for chosen in choices.items())
        )
    names = dict.fromkeys(choices.items(), 1.0)
    peak = max(
        fixed + sum(size for name, size in row.items() if name in names)
        for fixed, row in _moments(problem)
    )
    return Solution(dict(choices), peak, seconds, variance, gap)


def _links(
    problem: Problem, coupled: Mapping[tuple[Key, int | str], float]
) -> list[tuple[Key, int | str, str]]:
    """(source, its choice, the product rebuilt from it), one for each whose variance is coupled."""
    found = {
        (s.source, s.product) for s in problem.candidates if s.product and s.source is not None
    }
    return [
        (key, choice, product)
        for key, choice in coupled
        for source, product in sorted(found)
        if source == key
    ]


def _moments(problem: Problem) -> list[tuple[float, dict[tuple[Key, int | str], float]]]:
    """(fixed bytes, bytes by candidate or block and choice) of the moments, the highest for each set of
    stashes that stand."""
    highest: dict[tuple[int, str | None, str | None], float] = {}
    for moment in problem.moments:
        where = (moment.stored, moment.block, moment.mode)
        highest[where] = max(moment.fixed, highest.get(where, -math.inf))
    candidates = {candidate.key: candidate for candidate in problem.candidates}
    blocks = {block.name: block for block in problem.blocks}
    found = []
    for (stored, name, mode), fixed in highest.items():
        row: dict[tuple[Key, int | str], float] = {}
        begin = under_way(problem.order, stored)
        for place, (key, share) in enumerate(problem.order[:stored]):
            if key[1] == BLOCK:
                if key[2] == "begin" and key[0] in blocks:
                    block = blocks[key[0]]
                    row |= {(block.key, m): float(w.saved_bytes) for m, w in block.options.items()}
                continue
            for choice in candidates[key].choices():
                there = candidates[key].bytes(choice)
                if place >= begin:
                    there += candidates[key].offloaded_bytes(choice)
                size = share * there
                if size:
                    row[key, choice] = row.get((key, choice), 0.0) + size
        if name in blocks and mode is not None:
            # Counts in that mode alone.
            own = (blocks[name].key, mode)
            row[own] = row.get(own, 0.0) + fixed
            fixed = 0.0
        found.append((fixed, row))
    return found
