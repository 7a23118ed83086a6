"""Plan: a policy for a memory budget, chosen stash by stash, with what it will cost.

What could be done with every stash (`sites.py`), what that costs in time (`costs.py`) and in
gradient error (`sensitivity.py`), and how many bytes are live at every moment of the step
(`timeline.py`) make an integer program (`solver.py`). Its answer is played through the timeline
again, which shows the working set of the backward under those very choices; the program is corrected
by it and solved again until both agree. So the predicted bytes are those of the policy itself, not
of a model of it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.memory.compare import Runs
from mesa_train.memory.costs import Costs, seconds_of
from mesa_train.memory.footprint import device_of, footprint
from mesa_train.memory.gradients import default_loss
from mesa_train.memory.methods import PLAIN
from mesa_train.memory.plans import PRICE, OverBudget, Plan, Prediction
from mesa_train.memory.sensitivity import Sensitivity, calibrate, parameter_names, typical
from mesa_train.memory.sites import KEEP, Key, Watch, as_policy, sites_of, weights_of
from mesa_train.memory.solver import COST, PEAK, Problem, Solution, score, solve
from mesa_train.memory.states import adamw_bytes
from mesa_train.memory.text import format_bytes, parse_bytes
from mesa_train.memory.timeline import Timeline, timeline
from mesa_train.policy import PRESETS, Policy

logger = logging.getLogger(__name__)

_ROUNDS = 4


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

    Raises OverBudget, a ValueError that says what the smallest peak is, if nothing fits; ValueError
    for a bound out of range; ImportError, naming the extra, without scipy; what `footprint` raises.
    """
    return Planner(
        model,
        inputs,
        autocast=autocast,
        loss=loss,
        optimizer_bytes=optimizer_bytes,
        progress=progress,
    ).plan(budget, max_time=max_time, max_error=max_error)


class _Played(NamedTuple):
    """Choices, their timeline, and the sites of the stashes in the order that they were made."""

    solution: Solution
    timeline: Timeline
    order: list[Key]


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
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.model, self.inputs, self.autocast = model, inputs, autocast
        self.loss = loss or default_loss
        self.device = device_of(model)
        self.real = self.device.type != "meta"
        tell = progress or (lambda *_: None)
        tell("stashes", 0, 4)
        self.base = PRESETS["mesa8"]
        stored, first = self._play(self.base)
        linear = dataclasses.replace(self.base, recompute="linear")
        rebuilding, _ = self._play(linear, Watch(holding=True))
        whole, _ = self._play(dataclasses.replace(self.base, bits=32))
        self.sites = sites_of(stored, rebuilding, whole)
        if not self.sites:
            raise ValueError(
                f"{type(model).__name__} stores no tensor of {self.base.min_bytes} bytes or more "
                "with this batch, so there is nothing to choose"
            )
        self.universe = [(key, matrix) for key, _, matrix in stored.stored if matrix is not None]
        self.first = first
        tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        trained = [p for p in model.parameters() if p.requires_grad]
        if optimizer_bytes is None:
            optimizer_bytes = sum(adamw_bytes(p.numel(), p.element_size()) for p in trained)
        own = {
            t.data_ptr() if self.real else id(t): t
            for t in (*model.parameters(), *model.buffers(), *tensors)
        }
        self.standing = optimizer_bytes + sum(t.nbytes for t in own.values())
        tell("times", 1, 4)
        costs = Costs(self.device, autocast or torch.float32)
        self.seconds, self.matmul_s = seconds_of(costs, self.sites, weights_of(model))
        self.plain_s, self.anchor_s = self._anchor()
        # Where nothing was timed: the repeated matmuls are about a fifth of a ViT's step.
        eight = sum(self.seconds[s.key, 8] for s in self.sites)
        self.step_s = self.plain_s or 5 * sum(self.matmul_s.values()) or 10 * eight
        self.scratch = self._scratch()
        self.standing += self.scratch
        tell("gradients", 2, 4)
        self.sensitivity = self._sensitivity(lambda what: tell(f"gradient: {what}", 2, 4))
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
        room = None if budget is None else self._bytes(budget) - self.standing
        bounds = self._bounds(max_time, max_error)
        if room is not None and self.plain.peak_bytes - self.standing <= room:
            return self._as_plain()
        found = self._fitted(room, bounds)
        if found is not None and (room is not None or self._below_plain(found)):
            return found
        if room is None:
            return self._as_plain()
        smallest = self._smallest()
        asked = [f"a budget of {format_bytes(self._bytes(budget))}" if budget is not None else ""]
        asked += [f"{max_time:.2f} times plain's time" if max_time is not None else ""]
        asked += [f"a gradient error of {max_error:.1%}" if max_error is not None else ""]
        raise OverBudget.of(" and ".join(filter(None, asked)), smallest, self.standing)

    def frontier(self, points: int = 8) -> list[Plan]:
        """Plans for budgets spread between the smallest peak within reach and plain's, the smallest
        peak first; one that is beaten both in its peak and in what it costs is left out."""
        smallest = self._smallest()
        low, high = smallest.prediction.peak_bytes, self.plain.peak_bytes
        plans = [smallest]
        for number in range(1, points):
            size = int(low * (high / low) ** (number / points))
            found = self._fitted(size - self.standing, (None, None))
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
        return None if found is None else self._plan(found)

    def _search(self, room: int | None, bounds: _Bounds) -> _Played | None:
        """Solve, play the answer through the timeline, correct the program by it, and again."""
        best: _Played | None = None
        now: _Played | None = None
        limit, restarted = room, False
        for _ in range(8):
            found = solve(
                self._problem(now),
                budget=limit,
                max_seconds=bounds[0],
                max_variance=bounds[1],
                objective=COST if room is not None else PEAK,
                price=PRICE * self.step_s,
            )
            if found is None:
                # Near other choices, with another working set, there may be room yet.
                least = None if room is None or restarted else self._least_peak()
                if least is None or room is None or least.timeline.peak_bytes > room:
                    break
                now, limit, restarted = least, room, True
                if least.solution.within(*bounds):
                    best = least if best is None else best
                continue
            watch, played = self._play(as_policy(self.base, self.sites, found.choices))
            before = now.solution.choices if now is not None else None
            now = _Played(found, played, [key for key, *_ in watch.stored])
            fits = room is None or played.peak_bytes <= room
            known = best is not None and found.choices == best.solution.choices
            if fits and (best is None or self._better(now, best, room)):
                best = now
            if known or (fits and math.isclose(found.peak_bytes, played.peak_bytes, rel_tol=5e-3)):
                break
            if not fits and found.choices == before:
                # The program sees the same peak and calls it smaller: a rounding of its own.
                assert limit is not None
                limit -= max(played.peak_bytes - limit, 2**16)
        return best

    def _least_peak(self) -> _Played | None:
        """What has the smallest peak, searched for once."""
        if not self._least:
            self._least.append(self._search(None, (None, None)))
        return self._least[0]

    def _better(self, found: _Played, best: _Played, room: int | None) -> bool:
        if room is None:
            return found.timeline.peak_bytes < best.timeline.peak_bytes
        return found.solution.cost(PRICE * self.step_s) < best.solution.cost(PRICE * self.step_s)

    def _problem(self, near: _Played | None) -> Problem:
        """The program near choices whose timeline is known (None: 8 bits for all): what is live
        beside the stashes is taken to be the same."""
        base: dict[Key, int | str] = {s.key: 8 for s in self.sites}
        played, order = self.first, [key for key, _ in self.universe]
        if near is not None:
            base, played, order = near.solution.choices, near.timeline, near.order
        sites = {site.key: site for site in self.sites}
        shares = [(key, rows * cols / sites[key].elements) for key, (rows, cols) in self.universe]
        # Where each stash of that policy stands among all that there could be.
        places: list[int] = []
        start = 0
        for key in order:
            while start < len(shares) and shares[start][0] != key:
                start += 1
            places.append(start)
            start += 1
        own = [0.0]
        for key, share in shares:
            own.append(own[-1] + share * sites[key].bytes(base[key]))
        moments = []
        for moment in played.moments:
            count = places[moment.stored] if moment.stored < len(places) else len(shares)
            moments.append(
                (moment.peak_bytes - own[min(count, len(shares))], min(count, len(shares)))
            )
        s = self.sensitivity
        return Problem(
            self.sites, self.seconds, s.variance, self.matmul_s, s.coupled, moments, shares
        )

    def _plan(self, answer: _Played) -> Plan:
        found = answer.solution
        policy = as_policy(self.base, self.sites, found.choices)
        kept = self._kept(policy)
        eight: dict[Key, int | str] = {s.key: 8 for s in self.sites}
        problem = self._problem(None)
        extra = found.seconds - score(problem, eight).seconds
        step = None if self.anchor_s is None else self.anchor_s + extra
        error = math.sqrt(self.sensitivity.floor + found.variance)
        ratio = None if step is None or self.plain_s is None else step / self.plain_s
        peak = self.standing + answer.timeline.peak_bytes
        prediction = Prediction(kept, peak, step, ratio, error)
        return Plan(policy, prediction, found.choices, found.gap, self.plain)

    def _as_plain(self) -> Plan:
        choices: dict[Key, int | str] = {s.key: KEEP for s in self.sites}
        return Plan(Policy(enabled=False), self.plain, choices, 0.0, self.plain)

    def _prediction_of_plain(self) -> Prediction:
        peak = (
            self.standing
            + timeline(
                self.model, self.inputs, policy=PLAIN, autocast=self.autocast, loss=self.loss
            ).peak_bytes
        )
        error = math.sqrt(self.sensitivity.floor)
        ratio = None if self.plain_s is None else 1.0
        return Prediction(self._kept(PLAIN), peak, self.plain_s, ratio, error)

    def _kept(self, policy: Policy | str) -> int:
        return footprint(
            self.model,
            self.inputs,
            policy=policy,
            autocast=self.autocast,
            fake=True,
            device="cpu",
            loss=self.loss,
        ).saved_bytes

    def _play(self, policy: Policy, watch: Watch | None = None) -> tuple[Watch, Timeline]:
        watch = watch or Watch()
        played = timeline(
            self.model,
            self.inputs,
            policy=policy,
            autocast=self.autocast,
            loss=self.loss,
            watch=watch,
        )
        return watch, played

    def _anchor(self) -> tuple[float | None, float | None]:
        """Seconds of plain's step and of the base policy's; None without data."""
        if not self.real:
            return None, None
        runs = Runs(self.model, self.inputs, self.autocast, self.loss)
        try:
            plain, own = runs.times([PLAIN, self.base], _ROUNDS)
        except torch.OutOfMemoryError:
            logger.info("plain does not fit this device: plans go without times")
            return None, None
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        step = statistics.median(plain)
        return step, step * statistics.median(ratios)

    def _scratch(self) -> int:
        """Bytes that kernels allocate inside themselves, which tensors without data do not show: the
        real peak of the base policy beyond the counted one."""
        if not self.real:
            return 0
        real = Runs(self.model, self.inputs, self.autocast, self.loss).peak(self.base)
        return max(0, real - self.first.peak_bytes)

    def _sensitivity(self, progress: Callable[[str], None]) -> Sensitivity:
        if not self.real:
            return typical(self.sites)
        runs = Runs(self.model, self.inputs, self.autocast, self.loss)

        def gradients(policy: Policy | str | None) -> list[Tensor | None]:
            return runs.reference() if policy is None else runs.gradients(policy)

        names = parameter_names(self.model)
        try:
            return calibrate(self.sites, self.base, gradients, names, progress)
        except torch.OutOfMemoryError:
            # The passes keep nearly everything: where that does not fit, theory has to do.
            logger.info("no room to measure gradient errors: those of a typical ViT are taken")
            return typical(self.sites)

    def _bounds(self, max_time: float | None, max_error: float | None) -> _Bounds:
        """(most seconds of the choices, most variance)."""
        if max_time is not None and max_time < 1:
            raise ValueError(f"max_time is a multiple of plain's time, at least 1, got {max_time}")
        if max_error is not None and max_error <= 0:
            raise ValueError(f"max_error must be above 0, got {max_error}")
        seconds = None
        if max_time is not None:
            if self.plain_s is None or self.anchor_s is None:
                raise ValueError(
                    "max_time needs a model on a real device that plain fits, to be timed"
                )
            eight: dict[Key, int | str] = {s.key: 8 for s in self.sites}
            problem = self._problem(None)
            own = score(problem, eight).seconds
            seconds = max(0.0, own + max_time * self.plain_s - self.anchor_s)
        return seconds, None if max_error is None else max_error**2

    @staticmethod
    def _bytes(budget: int | str) -> int:
        size = parse_bytes(budget) if isinstance(budget, str) else budget
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"budget is bytes or text such as '8GiB', got {budget!r}")
        return size
