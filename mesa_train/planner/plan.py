"""What a planner returns: a policy, and what a step with it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

from mesa_train.measure.stash_log import Key
from mesa_train.policy import Policy
from mesa_train.utils.formatting import format_bytes

# What a squared gradient error of one is worth in time, as a multiple of the plain step: an error
# of 5 % is worth 10 % of the step.
ERROR_WEIGHT = 0.10 / 0.05**2


class OverBudget(ValueError):
    """No policy fits the budget. `smallest` is the plan with the smallest peak."""

    def __init__(self, message: str, smallest: Plan) -> None:
        super().__init__(message)
        self.smallest = smallest

    @classmethod
    def of(cls, asked: str, smallest: Plan, static: int) -> OverBudget:
        """The error for what was `asked`; `static` bytes are there whatever is chosen."""
        peak = format_bytes(smallest.prediction.peak_bytes)
        how = ", ".join(f"{kind} {choice}" for kind, choice, _ in smallest.summary())
        return cls(
            f"no policy fits {asked}; the smallest peak within reach is {peak} "
            f"({format_bytes(static)} of it there all the time: weights, inputs, optimizer "
            f"states, workspace), with {how}",
            smallest,
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a step with a plan's policy takes.

    saved_bytes: for the backward on the device, each storage once. peak_bytes: allocated at once in a
    step, with weights, buffers, inputs, gradients, optimizer states and the kernels' own workspace.
    step_s: forward and backward, None for a model without data or where plain does not fit;
    time_ratio: by plain's. gradient_error: relative L2 distance from the float32 gradient.
    offloaded_bytes: in CPU memory between forward and backward.
    """

    saved_bytes: int
    peak_bytes: int
    step_s: float | None
    time_ratio: float | None
    gradient_error: float
    offloaded_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """policy: for `wrap`. choices: by candidate, bits or "keep" or "rebuild". gap: how far the choice may
    be from the best one, relative to its cost. plain: what the step takes without a policy."""

    policy: Policy
    prediction: Prediction
    choices: dict[Key, int | str]
    gap: float
    plain: Prediction

    @property
    def cost(self) -> float:
        """Time and gradient error in one number, as a multiple of the plain step."""
        said = self.prediction
        return (said.time_ratio or 0.0) + ERROR_WEIGHT * said.gradient_error**2

    def summary(self) -> list[tuple[str, str, int]]:
        """(operator.operand, choice, how many candidates), in the order of the model."""
        counts: dict[tuple[str, str], int] = {}
        for (_, operator, operand), choice in self.choices.items():
            said = f"{choice} bits" if isinstance(choice, int) else choice
            key = (f"{operator}.{operand}".rstrip("."), said)
            counts[key] = counts.get(key, 0) + 1
        return [(*key, count) for key, count in counts.items()]
