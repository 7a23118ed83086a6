"""Choose for all candidates at once: an integer program that HiGHS solves to a proven gap.

The program minimises time + error_weight * error variance, or the peak. Its constraints are:

- At every moment of the step, the live bytes are at most the budget.
- The added time and the added variance are at most their bounds.
- A candidate is rebuilt only if the Linear that computes it is recomputed.
- The stashes of a block are chosen one by one, unless the block is checkpointed or left to PyTorch.
- The step waits if a copy to or from CPU memory takes longer than the computation beside it.

`solve` needs highspy, the Python package of HiGHS; the extra `plan` installs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesa_train.measure.profiling.blocks import STASHES
from mesa_train.measure.profiling.candidates import REBUILD
from mesa_train.measure.stash_log import BLOCK, Key

from .problem import HostLink, Problem, Solution, rows_of_moments, score

# Objectives.
COST, PEAK = "cost", "peak"
# Bytes of a unit of memory in the program, so that its rows are of one magnitude.
_UNIT = 2.0**20
# highspy's SolutionStatus.kSolutionStatusFeasible.
_FEASIBLE = 2
# The name of a variable: a choice of a candidate or block, a recomputed Linear, or both together.
_Name = tuple[Key, int | str] | tuple[Key, int | str, str] | str


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
        unit = _unit(program.seconds)
        highs.addConstr(
            program.sum(program.seconds, unit) + 1e-3 / unit * program.wait_ms <= max_seconds / unit
        )
    if max_variance is not None:
        unit = _unit(program.variance)
        highs.addConstr(program.sum(program.variance, unit) <= max_variance / unit)
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


def _unit(factors: Mapping[Any, float]) -> float:
    """Return the unit of a bounded sum: a thousandth of the sum of all factors.

    HiGHS accepts a sum that exceeds its bound by 1e-6. The seconds of a small model are of this
    magnitude.
    """
    return 1e-3 * sum(map(abs, factors.values())) or 1.0


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
        for fixed, sizes in rows_of_moments(problem):
            highs.addConstr((fixed + self.sum(sizes)) * (1 / _UNIT) <= self.peak)
        if problem.host_link is not None:
            self._add_host_link(problem.offloaded(), problem.host_link)

    def sum(self, factors: Mapping[Any, float], unit: float = 1.0) -> Any:
        """Return the sum of factor / unit * binary."""
        return self.highs.qsum(
            factor / unit * self.binaries[name] for name, factor in factors.items()
        )

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
