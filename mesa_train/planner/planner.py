"""Plan a policy for a memory budget, computed from a profile.

A profile (`measure/profiling/profile.py`) has the choices for every saved tensor and block, with
the bytes, seconds and gradient error of each choice. The planner makes an integer program of it
(`solver.py`).

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
from .solver import COST, PEAK, HostLink, Moment, Problem, Solution, solve

# A peak that is larger than the smallest by at most this part is as good.
_ABOUT = 2e-3


class _Answer(NamedTuple):
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
        room = None if cpu_memory is None else _bytes("cpu_memory", cpu_memory)
        self.profile, self.model = profile, model
        self.host_link = None
        if profile.times.host_link is not None:
            # A backward takes twice the time of a forward. Copies over the link that overlap with
            # computation take no time.
            step_s = profile.step_s
            self.host_link = HostLink(profile.times.host_link, step_s / 3, 2 * step_s / 3, room)
        self._least: list[_Answer | None] = []

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
        own = self.profile
        ratio = None if own.plain_s is None else 1.0
        peak, error = own.static_bytes + own.plain_peak_bytes, math.sqrt(own.sensitivity.floor)
        return Prediction(own.plain_saved_bytes, peak, own.plain_s, ratio, error)

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
            OverBudget: nothing fits; this ValueError says what the smallest peak is.
            ValueError: a bound is out of range.
        """
        room = None if budget is None else _bytes("budget", budget) - self.static
        bounds = self._bounds(max_time, max_error)
        if room is not None and self.plain.peak_bytes - self.static <= room:
            return self._as_plain()
        found = self._fitted(room, bounds)
        if found is not None and (room is not None or self._below_plain(found)):
            return found
        if room is None:
            return self._as_plain()
        smallest = self._smallest()
        asked = [
            f"a budget of {format_bytes(_bytes('budget', budget))}" if budget is not None else ""
        ]
        asked += [f"{max_time:.2f} times plain's time" if max_time is not None else ""]
        asked += [f"a gradient error of {max_error:.1%}" if max_error is not None else ""]
        raise OverBudget.of(" and ".join(filter(None, asked)), smallest, self.static)

    def frontier(self, points: int = 8) -> list[Plan]:
        """Make plans for budgets between the smallest possible peak and plain's peak.

        Args:
            points: number of budgets.

        Returns:
            The plans, the smallest peak first. A plan is left out if another has both a smaller
                peak and a lower cost.
        """
        smallest = self._smallest()
        low, high = smallest.prediction.peak_bytes, self.plain.peak_bytes
        plans = [smallest]
        for number in range(1, points):
            size = int(low * (high / low) ** (number / points))
            found = self._fitted(size - self.static, (None, None))
            if found is not None:
                plans.append(found)
        best: list[Plan] = []
        for found in sorted([*plans, self._as_plain()], key=lambda p: p.prediction.peak_bytes):
            if not best or found.cost < best[-1].cost:
                best.append(found)
        return best

    def _smallest(self) -> Plan:
        """The plan with the smallest peak, at any cost."""
        least = self._least_peak()
        found = None if least is None else self._plan(least)
        return found if found is not None and self._below_plain(found) else self._as_plain()

    def _below_plain(self, found: Plan) -> bool:
        """True if a plan has a smaller peak than plain."""
        return found.prediction.peak_bytes < self.plain.peak_bytes

    def _fitted(self, room: int | None, bounds: _Bounds) -> Plan | None:
        """The best plan within `room` bytes and the bounds; None if nothing fits."""
        found = self._search(room, bounds)
        if found is not None and room is None:
            found = self._cheapest(found, bounds)
        return None if found is None else self._plan(found)

    def _cheapest(self, least: _Answer, bounds: _Bounds) -> _Answer:
        """The cheapest of all choices with about the smallest peak.

        Many choices have this peak if the gradients take more bytes than the saved tensors.
        """
        found = self._search(int(least.peak_bytes * (1 + _ABOUT)), bounds)
        return least if found is None else found

    def _search(self, room: int | None, bounds: _Bounds) -> _Answer | None:
        """The better of the best choices with a host link and without.

        Stashes take memory while they are copied, so offloading nothing may be better in a small
        model.
        """
        found = self._searched(room, bounds, self.host_link)
        if self.host_link is None:
            return found
        still = self._searched(room, bounds, self.host_link._replace(room=0))
        if found is None or (still is not None and self._better(still, found, room)):
            return still
        return found

    def _searched(
        self, room: int | None, bounds: _Bounds, host_link: HostLink | None
    ) -> _Answer | None:
        """Solve the program, simulate the solution, correct the program by it, and repeat."""
        best: _Answer | None = None
        now: _Answer | None = None
        limit, restarted = room, False
        for _ in range(8):
            found = solve(
                self._problem(now, host_link),
                budget=limit,
                max_seconds=bounds[0],
                max_variance=bounds[1],
                objective=COST if room is not None else PEAK,
                price=ERROR_WEIGHT * self.profile.step_s,
            )
            if found is None:
                # Other choices have another working set and may still fit.
                least = None if room is None or restarted else self._least_peak()
                if least is None or room is None or least.peak_bytes > room:
                    break
                now, limit, restarted = least, room, True
                if least.solution.within(*bounds):
                    best = least if best is None else best
                continue
            before = now.solution.choices if now is not None else None
            now = _Answer(found, None if self.model is None else self.model.step(found.choices))
            if self.model is None:
                return now
            fits = room is None or now.peak_bytes <= room
            known = best is not None and found.choices == best.solution.choices
            if fits and (best is None or self._better(now, best, room)):
                best = now
            if known or (fits and math.isclose(found.peak_bytes, now.peak_bytes, rel_tol=5e-3)):
                break
            if not fits and found.choices == before:
                # The program counts this peak smaller than the simulated step does, by its own
                # rounding.
                assert limit is not None
                limit -= max(now.peak_bytes - limit, 2**16)
        if best is None and room is not None:
            # The program and the simulated step agreed for none of these choices. The smallest peak
            # may fit.
            least = self._least_peak()
            if least is not None and least.peak_bytes <= room and least.solution.within(*bounds):
                best = least
        return best

    def _least_peak(self) -> _Answer | None:
        """The choices with the smallest peak, searched once."""
        if not self._least:
            self._least.append(self._search(None, (None, None)))
            if self._least[0] is not None:
                self._least[0] = self._cheapest(self._least[0], (None, None))
        return self._least[0]

    def _better(self, found: _Answer, best: _Answer, room: int | None) -> bool:
        """True if a solution is better: a smaller peak without `room`, else a lower cost."""
        if room is None:
            return found.peak_bytes < best.peak_bytes
        return found.solution.cost(ERROR_WEIGHT * self.profile.step_s) < best.solution.cost(
            ERROR_WEIGHT * self.profile.step_s
        )

    def _problem(self, near: _Answer | None, host_link: HostLink | None) -> Problem:
        """Make the program near choices whose step is simulated (None: 8 bits for all).

        The bytes beside the stashes are assumed equal to the bytes of that step. For the other
        strategies of a block they are taken from the step in which all blocks have that strategy.
        """
        own = self.profile
        rows = dict(own.rows)
        if self.model is not None and near is not None and near.step is not None:
            rows |= self.model.rows(near.step)
        moments = [Moment(*row, *part) for part, part_rows in rows.items() for row in part_rows]
        return Problem(
            own.candidates,
            own.times.candidates,
            own.sensitivity.variance,
            own.times.matmuls,
            own.sensitivity.coupled,
            moments,
            own.order.entries,
            own.blocks,
            host_link,
        )

    def _plan(self, answer: _Answer) -> Plan:
        """The plan of a solution, with its prediction."""
        solution, own = answer.solution, self.profile
        policy = own.policy(solution.choices)
        if self.model is None:
            saved, offloaded = own.saved_bytes(solution.choices)
        else:
            counted = self.model.footprint(policy)
            saved, offloaded = counted.saved_bytes, counted.offloaded_bytes
        step = None if own.plain_s is None else own.plain_s + solution.seconds
        ratio = None if step is None or own.plain_s is None else step / own.plain_s
        error = math.sqrt(own.sensitivity.floor + solution.variance)
        peak = self.static + answer.peak_bytes
        prediction = Prediction(saved, peak, step, ratio, error, offloaded)
        return Plan(policy, prediction, solution.choices, solution.gap, self.plain)

    def _as_plain(self) -> Plan:
        """The plan without a policy."""
        choices: dict[Key, int | str] = {s.key: KEEP for s in self.profile.candidates}
        return Plan(Policy(enabled=False), self.plain, choices, 0.0, self.plain)

    def _bounds(self, max_time: float | None, max_error: float | None) -> _Bounds:
        """(most seconds of the choices, most variance) from the user's bounds."""
        if max_time is not None and max_time < 1:
            raise ValueError(f"max_time is a multiple of plain's time, at least 1, got {max_time}")
        if max_error is not None and max_error <= 0:
            raise ValueError(f"max_error must be above 0, got {max_error}")
        seconds = None
        if max_time is not None:
            if self.profile.plain_s is None:
                raise ValueError(
                    "max_time needs a model on a real device that plain fits, to be timed"
                )
            seconds = (max_time - 1) * self.profile.plain_s
        return seconds, None if max_error is None else max_error**2


def _bytes(field: str, given: int | str) -> int:
    """The bytes of a number or a text such as "8GiB"; ValueError if they are not above 0."""
    size = parse_bytes(given) if isinstance(given, str) else given
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"{field} is bytes or text such as '8GiB', got {given!r}")
    return size
