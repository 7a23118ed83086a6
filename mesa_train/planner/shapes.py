"""Plan for batches of several shapes: the plan's peak bounds the worst of them.

Images of several sizes, clips of several lengths and packed tokens give steps of several sizes. The
plan is made for the batch with the largest peak. Which batch that is depends on the policy. So the
steps of all batches are counted with the plan's policy, and a batch with a larger peak gets the next
plan. Counting takes fake tensors and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.measure.optimizer_states import static_bytes
from mesa_train.measure.timeline import timeline
from mesa_train.methods.apply import PLAIN
from mesa_train.policy import Policy

from .plan import Plan
from .planner import Planner


class ShapePlanner:
    """Makes plans for several batches; `plan` may be called several times.

    Args:
        model: the module.
        batches: example batches, at least one; each as `inputs` of `plan`.
        autocast, loss, optimizer_bytes: as for `plan`.
        measured: further keyword arguments of `Planner.of`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        autocast: torch.dtype | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer_bytes: int | None = None,
        **measured: Any,
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.autocast, self.loss, self.optimizer_bytes = autocast, loss, optimizer_bytes
        self.measured = measured
        self._planners: dict[int, Planner] = {}

    def plan(self, budget: int | str | None = None, **bounds: float | None) -> Plan:
        """Make a plan whose peak bounds the steps of all batches.

        Args:
            budget: as for the function `plan`.
            bounds: `max_time` and `max_error`, as for the function `plan`.

        Returns:
            The plan for the batch with the largest peak; its `worst` is the number of that batch.

        Raises:
            OverBudget: no policy fits the worst batch.
            ValueError: a bound is out of range.
        """
        worst = self._worst(PLAIN)
        seen: list[int] = []
        while True:
            seen.append(worst)
            plan = self._planner(worst).plan(budget, **bounds)
            larger = self._worst(plan.policy, above=worst)
            if larger in seen:
                return plan.of_batch(worst)
            worst = larger

    def _planner(self, number: int) -> Planner:
        """The planner of one batch, which is profiled once."""
        if number not in self._planners:
            self._planners[number] = Planner.of(
                self.model,
                self.batches[number],
                autocast=self.autocast,
                loss=self.loss,
                optimizer_bytes=self.optimizer_bytes,
                **self.measured,
            )
        return self._planners[number]

    def _worst(self, policy: Policy | str, above: int | None = None) -> int:
        """The batch with the largest peak; `above` if no batch has a larger one than that."""
        if len(self.batches) == 1:
            return 0
        peaks = [self._peak(batch, policy) for batch in self.batches]
        worst = max(range(len(peaks)), key=peaks.__getitem__)
        return worst if above is None or peaks[worst] > peaks[above] else above

    def _peak(self, batch: Any, policy: Policy | str) -> int:
        """Bytes of a step, without the kernels' workspace."""
        counted = timeline(self.model, batch, policy=policy, autocast=self.autocast, loss=self.loss)
        return static_bytes(self.model, batch, self.optimizer_bytes) + counted.peak_bytes
