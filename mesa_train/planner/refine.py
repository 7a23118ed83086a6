"""Compare the first real steps with the budget, and plan again if one takes more.

A plan predicts the peak of a step. A training may allocate more: an averaged copy of the weights,
metrics, another stream. So the peaks of the first steps are read from the allocator. If a step took
more than the budget, the next plan has that much less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from mesa_train.engine.wrap import wrap
from mesa_train.utils.formatting import format_bytes

from .plan import OverBudget, Plan

_log = logging.getLogger(__name__)


class Plans(Protocol):
    """Makes plans for budgets."""

    def plan(self, budget: int | str | None = None) -> Plan:
        """A plan for a budget."""


class PeakWatch:
    """Reads the peak of each of the first steps, and wraps the model again after a larger one.

    A step lasts from one forward of the model to the next.

    Args:
        model: the wrapped model.
        planner: makes the next plan.
        budget: bytes.
        steps: number of steps to compare.
        peak: most bytes allocated since the last call; reading resets it.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Plans,
        budget: int,
        steps: int,
        peak: Callable[[], int],
    ) -> None:
        self.model, self.planner, self.budget, self.target = model, planner, budget, budget
        self.peak, self.left = peak, steps
        self._begun = False
        self._handle = model.register_forward_pre_hook(self._begins)

    def stop(self) -> None:
        """Compare no more steps."""
        self._handle.remove()

    def _begins(self, *_: Any) -> None:
        """A forward begins."""
        if not torch.is_grad_enabled():
            return
        measured = self.peak()
        if self._begun and measured > self.budget:
            self._again(measured)
        elif self._begun:
            self.left -= 1
        self._begun = True
        if self.left <= 0:
            self.stop()

    def _again(self, measured: int) -> None:
        """Plan for a smaller budget after a step that took more than the budget."""
        self.target -= measured - self.budget
        took = f"a step took {format_bytes(measured)} of a budget of {format_bytes(self.budget)}"
        try:
            if self.target <= 0:
                raise ValueError("nothing is left of it")
            plan = self.planner.plan(self.target)
        except (OverBudget, ValueError) as error:
            _log.warning("%s, and no other plan fits: %s", took, error)
            self.left = 0
            return
        wrap(self.model, plan.policy)
        _log.warning("%s: planned again for %s", took, format_bytes(self.target))


def cuda_peak(device: torch.device) -> Callable[[], int]:
    """The reader of a GPU's peak."""

    def read() -> int:
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    return read
