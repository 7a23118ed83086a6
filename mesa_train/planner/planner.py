"""Plan a policy for a memory budget, computed from a profile.

A profile (`measure/profiling/profile.py`) has the choices for every saved tensor and block, with
the bytes, seconds and gradient error of each choice. The planner makes an integer program of it
(`problem.py`) and solves it (`solver.py`).

The bytes beside the stashes change with the choices. With a model, the planner simulates a step
with the solution on fake tensors, corrects the program and solves it again until both agree. Then
the predicted bytes are the counted bytes of the policy itself. A plan from a loaded profile alone
takes the bytes beside the stashes from the profiled steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mesa_train.measure.profiling.candidates import KEEP
from mesa_train.measure.profiling.profile import Profile, Profiler
from mesa_train.measure.profiling.simulator import SimulatedStep
from mesa_train.measure.stash_log import Key
from mesa_train.policy import Policy
from mesa_train.utils.formatting import format_bytes, parse_bytes

from .plan import ERROR_WEIGHT, OverBudget, Plan, Prediction
from .problem import HostLink, Moment, Problem, Solution
from .solver import COST, PEAK, solve

# A peak that is larger than the smallest by at most this part is as good.
_PEAK_TOLERANCE = 2e-3


class _SimulatedSolution(NamedTuple):
    """A solution, with its simulated step if there is a model."""

    solution: Solution
    step: SimulatedStep | None

    @property
    def peak_bytes(self) -> int:
        """Peak of the simulated step, else of the program, without static bytes."""
        if self.step is None:
            return math.ceil(self.solution.peak_bytes)
        return self.step.timeline.peak_bytes


# (most seconds of the choices, most variance); None for no bound.
_Bounds = tuple[float | None, float | None]


class Planner:
    """Makes plans from one profile; `plan` may be called several times.

    Args:
        profile: of the model and batch.
        model: measures and simulates that model, so that predicted bytes are counted; None takes
            them from the profile.
        cpu_memory: most CPU memory for offloaded stashes, such as "64GiB"; None for no bound.
    """

    def __init__(
        self,
        profile: Profile,
        model: Profiler | None = None,
        *,
        cpu_memory: int | str | None = None,
    ) -> None:
        capacity = None if cpu_memory is None else _bytes("cpu_memory", cpu_memory)
        self.profile, self.model = profile, model
        self.host_link = None
        if profile.times.host_link is not None:
            # A backward takes twice the time of a forward. Copies over the link that overlap with
            # computation take no time.
            step_s = profile.step_s
            self.host_link = HostLink(profile.times.host_link, step_s / 3, 2 * step_s / 3, capacity)
        self._smallest_peak_cache: list[_SimulatedSolution | None] = []

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        *,
        autocast: torch.dtype | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer_bytes: int | None = None,
        cpu_memory: int | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Planner:
        """Profile a model and batch and make their planner.

        Args:
            model: as for `plan`.
            inputs: as for `plan`.
            autocast: as for `plan`.
            loss: as for `plan`.
            optimizer_bytes: as for `plan`.
            cpu_memory: as for `plan`.
            progress: as for `plan`.
        """
        if cpu_memory is not None:
            _bytes("cpu_memory", cpu_memory)
        profiler = Profiler(
            model,
            inputs,
            autocast=autocast,
            loss=loss,
            optimizer_bytes=optimizer_bytes,
            progress=progress,
        )
        return cls(profiler.profile, profiler, cpu_memory=cpu_memory)

    @property
    def static(self) -> int:
        """Bytes that exist during the whole step under every choice."""
        return self.profile.static_bytes

    @property
    def plain(self) -> Prediction:
        """Prediction for a step without a policy."""
        profile = self.profile
        ratio = None if profile.plain_s is None else 1.0
        peak, error = (
            profile.static_bytes + profile.plain_peak_bytes,
            math.sqrt(profile.sensitivity.floor),
        )
        return Prediction(profile.plain_saved_bytes, peak, profile.plain_s, ratio, error)

    def plan(
        self,
        budget: int | str | None = None,
        *,
        max_time: float | None = None,
        max_error: float | None = None,
    ) -> Plan:
        """Make a plan for this model and batch.

        Args:
            budget: as for the function `plan`.
            max_time: as for the function `plan`.
            max_error: as for the function `plan`.

        Raises:
            OverBudget: no policy fits; its message has the smallest possible peak.
            ValueError: a bound is out of range.
        """
        budget_bytes = None if budget is None else _bytes("budget", budget) - self.static
        bounds = self._bounds(max_time, max_error)
        if budget_bytes is not None and self.plain.peak_bytes - self.static <= budget_bytes:
            return self._plain_plan()
        best = self._best_plan(budget_bytes, bounds)
        if best is not None and (budget_bytes is not None or self._below_plain(best)):
            return best
        if budget_bytes is None:
            return self._plain_plan()
        smallest = self._smallest_plan()
        limits = [
            f"a budget of {format_bytes(_bytes('budget', budget))}" if budget is not None else ""
        ]
        limits += [f"{max_time:.2f} times plain's time" if max_time is not None else ""]
        limits += [f"a gradient error of {max_error:.1%}" if max_error is not None else ""]
        raise OverBudget.of(" and ".join(filter(None, limits)), smallest, self.static)

    def frontier(self, points: int = 8) -> list[Plan]:
        """Make plans for budgets between the smallest possible peak and plain's peak.

        Args:
            points: number of budgets.

        Returns:
            The plans, the smallest peak first. A plan is left out if another has both a smaller
                peak and a lower cost.
        """
        smallest = self._smallest_plan()
        lowest, highest = smallest.prediction.peak_bytes, self.plain.peak_bytes
        plans = [smallest]
        for index in range(1, points):
            budget_bytes = int(lowest * (highest / lowest) ** (index / points))
            plan = self._best_plan(budget_bytes - self.static, (None, None))
            if plan is not None:
                plans.append(plan)
        best: list[Plan] = []
        for plan in sorted(
            [*plans, self._plain_plan()], key=lambda plan: plan.prediction.peak_bytes
        ):
            if not best or plan.cost < best[-1].cost:
                best.append(plan)
        return best

    def _smallest_plan(self) -> Plan:
        """The plan with the smallest peak, at any cost."""
        solution = self._smallest_peak()
        plan = None if solution is None else self._to_plan(solution)
        return plan if plan is not None and self._below_plain(plan) else self._plain_plan()

    def _below_plain(self, plan: Plan) -> bool:
        """True if a plan has a smaller peak than plain."""
        return plan.prediction.peak_bytes < self.plain.peak_bytes

    def _best_plan(self, budget_bytes: int | None, bounds: _Bounds) -> Plan | None:
        """Return the best plan within the bounds; None if nothing fits.

        Args:
            budget_bytes: most bytes beside the static bytes; None for the smallest peak.
            bounds: most seconds and most variance of the choices.
        """
        best = self._search(budget_bytes, bounds)
        if best is not None and budget_bytes is None:
            best = self._cheapest_near(best, bounds)
        return None if best is None else self._to_plan(best)

    def _cheapest_near(self, smallest: _SimulatedSolution, bounds: _Bounds) -> _SimulatedSolution:
        """Return the cheapest of all choices with about the smallest peak.

        Many choices have this peak if the gradients take more bytes than the saved tensors.
        """
        cheapest = self._search(int(smallest.peak_bytes * (1 + _PEAK_TOLERANCE)), bounds)
        return smallest if cheapest is None else cheapest

    def _search(self, budget_bytes: int | None, bounds: _Bounds) -> _SimulatedSolution | None:
        """Return the best choices, with offload or without.

        A stash takes device memory while it is copied. Therefore a small model may have a smaller
        peak without offload.
        """
        best = self._solve_until_stable(budget_bytes, bounds, self.host_link)
        if self.host_link is None:
            return best
        without_offload = self._solve_until_stable(
            budget_bytes, bounds, self.host_link._replace(capacity=0)
        )
        if best is None or (
            without_offload is not None and self._is_better(without_offload, best, budget_bytes)
        ):
            return without_offload
        return best

    def _solve_until_stable(
        self, budget_bytes: int | None, bounds: _Bounds, host_link: HostLink | None
    ) -> _SimulatedSolution | None:
        """Solve the program, simulate the solution and correct the program, until both agree."""
        best: _SimulatedSolution | None = None
        current: _SimulatedSolution | None = None
        limit, restarted = budget_bytes, False
        for _ in range(8):
            solution = solve(
                self._problem(current, host_link),
                budget=limit,
                max_seconds=bounds[0],
                max_variance=bounds[1],
                objective=COST if budget_bytes is not None else PEAK,
                error_weight=ERROR_WEIGHT * self.profile.step_s,
            )
            if solution is None:
                # Other choices have another working set and may still fit.
                smallest = None if budget_bytes is None or restarted else self._smallest_peak()
                if smallest is None or budget_bytes is None or smallest.peak_bytes > budget_bytes:
                    break
                current, limit, restarted = smallest, budget_bytes, True
                if smallest.solution.within(*bounds):
                    best = smallest if best is None else best
                continue
            previous = current.solution.choices if current is not None else None
            current = _SimulatedSolution(
                solution, None if self.model is None else self.model.step(solution.choices)
            )
            if self.model is None:
                return current
            fits = budget_bytes is None or current.peak_bytes <= budget_bytes
            seen = best is not None and solution.choices == best.solution.choices
            if fits and (best is None or self._is_better(current, best, budget_bytes)):
                best = current
            if seen or (
                fits and math.isclose(solution.peak_bytes, current.peak_bytes, rel_tol=5e-3)
            ):
                break
            if not fits and solution.choices == previous:
                # The peak of the program is smaller than the peak of the simulated step, because of
                # rounding.
                assert limit is not None
                limit -= max(current.peak_bytes - limit, 2**16)
        if best is None and budget_bytes is not None:
            # The program and the simulated step agreed for none of these choices. The smallest peak
            # may fit.
            smallest = self._smallest_peak()
            if (
                smallest is not None
                and smallest.peak_bytes <= budget_bytes
                and smallest.solution.within(*bounds)
            ):
                best = smallest
        return best

    def _smallest_peak(self) -> _SimulatedSolution | None:
        """The choices with the smallest peak, searched once."""
        if not self._smallest_peak_cache:
            self._smallest_peak_cache.append(self._search(None, (None, None)))
            if self._smallest_peak_cache[0] is not None:
                self._smallest_peak_cache[0] = self._cheapest_near(
                    self._smallest_peak_cache[0], (None, None)
                )
        return self._smallest_peak_cache[0]

    def _is_better(
        self, candidate: _SimulatedSolution, best: _SimulatedSolution, budget_bytes: int | None
    ) -> bool:
        """True if `candidate` has a lower cost than `best`; without a budget, a smaller peak."""
        if budget_bytes is None:
            return candidate.peak_bytes < best.peak_bytes
        return candidate.solution.cost(ERROR_WEIGHT * self.profile.step_s) < best.solution.cost(
            ERROR_WEIGHT * self.profile.step_s
        )

    def _problem(self, solution: _SimulatedSolution | None, host_link: HostLink | None) -> Problem:
        """Make the integer program from the profile and one simulated step.

        The program assumes that the bytes beside the stashes are the bytes of the simulated step.
        For the other strategies of a block it takes them from the step in which all blocks have
        that strategy.

        Args:
            solution: a solution with its simulated step; None assumes 8 bits for all candidates.
            host_link: the link to CPU memory; None offloads nothing.
        """
        profile = self.profile
        rows = dict(profile.rows)
        if self.model is not None and solution is not None and solution.step is not None:
            rows |= self.model.rows(solution.step)
        moments = [Moment(*row, *part) for part, part_rows in rows.items() for row in part_rows]
        return Problem(
            profile.candidates,
            profile.times.candidates,
            profile.sensitivity.variance,
            profile.times.matmuls,
            profile.sensitivity.coupled,
            moments,
            profile.order.entries,
            profile.blocks,
            host_link,
        )

    def _to_plan(self, simulated: _SimulatedSolution) -> Plan:
        """The plan of a solution, with its prediction."""
        solution, profile = simulated.solution, self.profile
        policy = profile.policy(solution.choices)
        if self.model is None:
            saved, offloaded = profile.saved_bytes(solution.choices)
        else:
            counted = self.model.footprint(policy)
            saved, offloaded = counted.saved_bytes, counted.offloaded_bytes
        step = None if profile.plain_s is None else profile.plain_s + solution.seconds
        ratio = None if step is None or profile.plain_s is None else step / profile.plain_s
        error = math.sqrt(profile.sensitivity.floor + solution.variance)
        peak = self.static + simulated.peak_bytes
        prediction = Prediction(saved, peak, step, ratio, error, offloaded)
        return Plan(policy, prediction, solution.choices, solution.gap, self.plain)

    def _plain_plan(self) -> Plan:
        """The plan without a policy."""
        choices: dict[Key, int | str] = {
            candidate.key: KEEP for candidate in self.profile.candidates
        }
        return Plan(Policy(enabled=False), self.plain, choices, 0.0, self.plain)

    def _bounds(self, max_time: float | None, max_error: float | None) -> _Bounds:
        """(most seconds of the choices, most variance) from the user's bounds."""
        if max_time is not None and max_time < 1:
            raise ValueError(
                f"max_time, a multiple of plain's time, must be at least 1, got {max_time}"
            )
        if max_error is not None and max_error <= 0:
            raise ValueError(f"max_error must be above 0, got {max_error}")
        seconds = None
        if max_time is not None:
            if self.profile.plain_s is None:
                raise ValueError(
                    "max_time needs a timed plain step: a model on a real device whose memory plain "
                    "fits"
                )
            seconds = (max_time - 1) * self.profile.plain_s
        return seconds, None if max_error is None else max_error**2


def _bytes(field: str, value: int | str) -> int:
    """The bytes of a number or a text such as "8GiB"; ValueError if they are not above 0."""
    size = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"{field} must be bytes above 0 or text such as '8GiB', got {value!r}")
    return size
