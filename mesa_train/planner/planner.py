"""Plan: a policy for a memory budget, chosen stash by stash, with what it will cost.

What could be done with every stash and block (`candidates.py`, `blocks.py`), what that costs in time
(`time_model.py`) and in gradient error (`sensitivity.py`), and how many bytes are live at every moment of
the step (`memory_model.py`) make an integer program (`solver.py`). Its answer is played through the timeline
again, which shows the working set of the backward under those very choices; the program is corrected
by it and solved again until both agree. So the predicted bytes are those of the policy itself, not
of a model of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mesa_train.estimate.model_states import static_bytes
from mesa_train.measure.runner import Runs
from mesa_train.measure.stash_log import BLOCK, Key
from mesa_train.measure.step import default_loss, device_of
from mesa_train.measure.timeline import timeline
from mesa_train.methods.apply import PLAIN
from mesa_train.policy import Policy
from mesa_train.utils.formatting import format_bytes, parse_bytes

from .blocks import PYTORCH, Block, BlockOption
from .candidates import KEEP, also_offloaded
from .memory_model import Choices, SimulatedStep
from .plan import ERROR_WEIGHT, OverBudget, Plan, Prediction
from .search_space import SearchSpace
from .sensitivity import Sensitivity, calibrate, parameter_names, typical
from .solver import COST, PEAK, HostLink, Moment, Problem, Solution, solve
from .time_model import CHECKPOINT, CHECKPOINT_CODES, fit_time_model

logger = logging.getLogger(__name__)

# A peak this much above the smallest is as good, relatively.
_ABOUT = 2e-3


def plan(
    model: nn.Module,
    inputs: Any,
    budget: int | str | None = None,
    *,
    max_time: float | None = None,
    max_error: float | None = None,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer_bytes: int | None = None,
    cpu_memory: int | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """The policy that fits `budget` at the least time and gradient error; the model stays as it was.

    inputs, autocast: as for `footprint`. A model on the meta device is planned for by counting
    alone: bytes are exact, time and error are those of a typical GPU and ViT.
    budget: most bytes allocated at once in a training step, such as "8GiB"; None for as few as the
        other bounds allow.
    max_time: most step time, as a multiple of plain's (1.1: 10 % more). max_error: most relative
        error of the gradient that codes may add to plain's.
    loss: from the output to a scalar; default: `default_loss`.
    optimizer_bytes: of the optimizer's states; default: AdamW's of the trained parameters.
    cpu_memory: most CPU memory for what is offloaded there, such as "64GiB"; None for any. Nothing is
        offloaded where the model is on a CPU.

    Raises OverBudget, a ValueError that says what the smallest peak is, if nothing fits; ValueError
    for a bound out of range; ImportError, naming the extra, without scipy; what `footprint` raises.
    """
    return Planner(
        model,
        inputs,
        autocast=autocast,
        loss=loss,
        optimizer_bytes=optimizer_bytes,
        cpu_memory=cpu_memory,
        progress=progress,
    ).plan(budget, max_time=max_time, max_error=max_error)


class _Played(NamedTuple):
    """A solution with the step that it makes."""

    solution: Solution
    simulated: SimulatedStep

    @property
    def peak_bytes(self) -> int:
        return self.simulated.timeline.peak_bytes


# Most seconds of the choices, and most variance.
_Bounds = tuple[float | None, float | None]


class Planner:
    """What is known of one model and batch; `plan` may be asked several times."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        autocast: torch.dtype | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer_bytes: int | None = None,
        cpu_memory: int | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        room = None if cpu_memory is None else self._bytes("cpu_memory", cpu_memory)
        self.model, self.inputs, self.autocast = model, inputs, autocast
        self.loss = loss or default_loss
        self.device = device_of(model)
        self.real = self.device.type != "meta"
        tell = progress or (lambda *_: None)
        tell("stashes", 0, 4)
        self.space = SearchSpace(model, inputs, autocast, self.loss)
        self.simulator, self.candidates = self.space.simulator, self.space.candidates
        self.static = static_bytes(model, inputs, optimizer_bytes)
        tell("times", 1, 4)
        self.plain_s, self.times = fit_time_model(self.space, self.device)
        tell("gradients", 2, 4)
        self.sensitivity = self._sensitivity(lambda what: tell(f"gradient: {what}", 2, 4))
        self.blocks = self._blocks()
        # Where nothing was timed: the repeated matmuls are about a fifth of a ViT's step.
        eight = sum(self.times.candidates[s.key, 8] for s in self.candidates)
        self.step_s = self.plain_s or 5 * sum(self.times.matmuls.values()) or 10 * eight
        # A backward takes twice a forward: what goes over the link meanwhile takes no time.
        self.host_link = None
        if self.times.host_link is not None:
            self.host_link = HostLink(
                self.times.host_link, self.step_s / 3, 2 * self.step_s / 3, room
            )
        self._least: list[_Played | None] = []
        tell("choosing", 3, 4)
        self.plain = self._prediction_of_plain()

    def plan(
        self,
        budget: int | str | None = None,
        *,
        max_time: float | None = None,
        max_error: float | None = None,
    ) -> Plan:
        """As `plan`, for this model and batch."""
        room = None if budget is None else self._bytes("budget", budget) - self.static
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
            f"a budget of {format_bytes(self._bytes('budget', budget))}"
            if budget is not None
            else ""
        ]
        asked += [f"{max_time:.2f} times plain's time" if max_time is not None else ""]
        asked += [f"a gradient error of {max_error:.1%}" if max_error is not None else ""]
        raise OverBudget.of(" and ".join(filter(None, asked)), smallest, self.static)

    def frontier(self, points: int = 8) -> list[Plan]:
        """Plans for budgets spread between the smallest peak within reach and plain's, the smallest
        peak first; one that is beaten both in its peak and in what it costs is left out."""
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
        """The plan with the smallest peak, whatever it costs."""
        least = self._least_peak()
        found = None if least is None else self._plan(least)
        return found if found is not None and self._below_plain(found) else self._as_plain()

    def _below_plain(self, found: Plan) -> bool:
        return found.prediction.peak_bytes < self.plain.peak_bytes

    def _fitted(self, room: int | None, bounds: _Bounds) -> Plan | None:
        found = self._search(room, bounds)
        if found is not None and room is None:
            found = self._cheapest(found, bounds)
        return None if found is None else self._plan(found)

    def _cheapest(self, least: _Played, bounds: _Bounds) -> _Played:
        """Of the choices with about the smallest peak, those that cost least: many have it, where the
        gradients weigh more than what is kept."""
        found = self._search(int(least.peak_bytes * (1 + _ABOUT)), bounds)
        return least if found is None else found

    def _search(self, room: int | None, bounds: _Bounds) -> _Played | None:
        """The best choices, with a host link and without: what is on its way takes memory too, so in a small
        model it may be better to move nothing."""
        found = self._searched(room, bounds, self.host_link)
        if self.host_link is None:
            return found
        still = self._searched(room, bounds, self.host_link._replace(room=0))
        if found is None or (still is not None and self._better(still, found, room)):
            return still
        return found

    def _searched(
        self, room: int | None, bounds: _Bounds, host_link: HostLink | None
    ) -> _Played | None:
        """Solve, simulate the answer through the timeline, correct the program by it, and again."""
        best: _Played | None = None
        now: _Played | None = None
        limit, restarted = room, False
        for _ in range(8):
            found = solve(
                self._problem(now, host_link),
                budget=limit,
                max_seconds=bounds[0],
                max_variance=bounds[1],
                objective=COST if room is not None else PEAK,
                price=ERROR_WEIGHT * self.step_s,
            )
            if found is None:
                # Near other choices, with another working set, there may be room yet.
                least = None if room is None or restarted else self._least_peak()
                if least is None or room is None or least.peak_bytes > room:
                    break
                now, limit, restarted = least, room, True
                if least.solution.within(*bounds):
                    best = least if best is None else best
                continue
            before = now.solution.choices if now is not None else None
            now = _Played(
                found, self.simulator.simulated(self.space.policy(found.choices), found.choices)
            )
            fits = room is None or now.peak_bytes <= room
            known = best is not None and found.choices == best.solution.choices
            if fits and (best is None or self._better(now, best, room)):
                best = now
            if known or (fits and math.isclose(found.peak_bytes, now.peak_bytes, rel_tol=5e-3)):
                break
            if not fits and found.choices == before:
                # The program sees the same peak and calls it smaller: a rounding of its own.
                assert limit is not None
                limit -= max(now.peak_bytes - limit, 2**16)
        if best is None and room is not None:
            # Near none of these choices the program and the step agreed: there is still the least.
            least = self._least_peak()
            if least is not None and least.peak_bytes <= room and least.solution.within(*bounds):
                best = least
        return best

    def _least_peak(self) -> _Played | None:
        """What has the smallest peak, searched for once."""
        if not self._least:
            self._least.append(self._search(None, (None, None)))
            if self._least[0] is not None:
                self._least[0] = self._cheapest(self._least[0], (None, None))
        return self._least[0]

    def _better(self, found: _Played, best: _Played, room: int | None) -> bool:
        if room is None:
            return found.peak_bytes < best.peak_bytes
        return found.solution.cost(ERROR_WEIGHT * self.step_s) < best.solution.cost(
            ERROR_WEIGHT * self.step_s
        )

    def _problem(self, near: _Played | None, host_link: HostLink | None) -> Problem:
        """The program near choices whose timeline is known (None: 8 bits for all): what is live
        beside the stashes is taken to be the same; in other modes of a block as where all blocks
        are in that mode."""
        rows = dict(self.space.rows)
        if near is not None:
            rows |= self.simulator.rows(near.simulated, self.space.order)
        moments = [Moment(*row, *part) for part, own in rows.items() for row in own]
        s, p = self.sensitivity, self.times
        return Problem(
            self.candidates,
            p.candidates,
            s.variance,
            p.matmuls,
            s.coupled,
            moments,
            self.space.order.entries,
            self.blocks,
            host_link,
        )

    def _plan(self, answer: _Played) -> Plan:
        found = answer.solution
        policy = self.space.policy(found.choices)
        kept = self.space.footprint(policy)
        step = None if self.plain_s is None else self.plain_s + found.seconds
        ratio = None if step is None or self.plain_s is None else step / self.plain_s
        error = math.sqrt(self.sensitivity.floor + found.variance)
        peak = self.static + answer.peak_bytes
        prediction = Prediction(kept.saved_bytes, peak, step, ratio, error, kept.offloaded_bytes)
        return Plan(policy, prediction, found.choices, found.gap, self.plain)

    def _as_plain(self) -> Plan:
        choices: dict[Key, int | str] = {s.key: KEEP for s in self.candidates}
        return Plan(Policy(enabled=False), self.plain, choices, 0.0, self.plain)

    def _prediction_of_plain(self) -> Prediction:
        counted = timeline(
            self.model, self.inputs, policy=PLAIN, autocast=self.autocast, loss=self.loss
        )
        plain: Choices = {(b, BLOCK, ""): PYTORCH for b in self.simulator.blocks}
        peak = self.static + self.simulator.whole(counted, plain).peak_bytes
        error = math.sqrt(self.sensitivity.floor)
        ratio = None if self.plain_s is None else 1.0
        return Prediction(self.space.footprint(PLAIN).saved_bytes, peak, self.plain_s, ratio, error)

    def _sensitivity(self, progress: Callable[[str], None]) -> Sensitivity:
        found = self._calibrated(progress)
        also_offloaded(found.variance, self.candidates)
        also_offloaded(found.coupled, self.candidates)
        return found

    def _calibrated(self, progress: Callable[[str], None]) -> Sensitivity:
        every = [*self.candidates, *self.space.block_inputs.values()]
        if not self.real:
            return typical(every)
        runs = Runs(self.model, self.inputs, self.autocast, self.loss)

        def gradients(policy: Policy | str | None) -> list[Tensor | None]:
            return runs.reference() if policy is None else runs.gradients(policy)

        checkpointing = {
            mode.bits: self.space.policy(self.space.all(KEEP, name))
            for name, mode in self.space.modes.items()
            if mode.checkpointed and not (mode.codes or mode.offloaded) and self.space.block_inputs
        }
        try:
            return calibrate(
                self.candidates,
                self.space.base,
                gradients,
                parameter_names(self.model),
                progress,
                list(self.space.block_inputs.values()),
                checkpointing,
            )
        except torch.OutOfMemoryError:
            # The passes keep nearly everything: where that does not fit, theory has to do.
            logger.info("no room to measure gradient errors: those of a typical ViT are taken")
            return typical(every)

    def _blocks(self) -> list[Block]:
        """What every block takes in its modes."""
        found = []
        for name in self.simulator.blocks:
            inside = sum(
                self.sensitivity.variance[s.key, 8] for s in self.candidates if s.block == name
            )
            options = {}
            for label, mode in self.space.modes.items():
                kind = CHECKPOINT_CODES if mode.codes else CHECKPOINT
                seconds = self.times.blocks[name, kind] if mode.checkpointed else 0.0
                variance = inside if mode.codes else 0.0
                candidate = self.space.block_inputs.get(name)
                if candidate is not None and mode.bits is not None:
                    variance += self.sensitivity.variance[candidate.key, mode.bits]
                kept = self.space.order.kept[name, label]
                offloaded = self.space.input_bytes(name, mode.bits) if mode.offloaded else 0
                options[label] = BlockOption(kept, seconds, variance, offloaded)
            found.append(Block(name, options))
        return found

    def _bounds(self, max_time: float | None, max_error: float | None) -> _Bounds:
        """(most seconds of the choices, most variance)."""
        if max_time is not None and max_time < 1:
            raise ValueError(f"max_time is a multiple of plain's time, at least 1, got {max_time}")
        if max_error is not None and max_error <= 0:
            raise ValueError(f"max_error must be above 0, got {max_error}")
        seconds = None
        if max_time is not None:
            if self.plain_s is None:
                raise ValueError(
                    "max_time needs a model on a real device that plain fits, to be timed"
                )
            seconds = (max_time - 1) * self.plain_s
        return seconds, None if max_error is None else max_error**2

    @staticmethod
    def _bytes(field: str, given: int | str) -> int:
        size = parse_bytes(given) if isinstance(given, str) else given
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"{field} is bytes or text such as '8GiB', got {given!r}")
        return size
