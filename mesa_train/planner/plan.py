"""Describe a plan: a policy with the predicted memory, time and error of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

from mesa_train.measure.stash_log import Key
from mesa_train.policy import Policy
from mesa_train.utils.formatting import format_bytes

# Weight of a squared gradient error of one, as a multiple of the time of the plain step. An error
# of 5 % costs as much as 10 % of the step.
ERROR_WEIGHT = 0.10 / 0.05**2


class OverBudget(ValueError):
    """No policy fits the budget.

    Args:
        message: the text of the error.
        smallest: the plan with the smallest peak.
    """

    def __init__(self, message: str, smallest: Plan) -> None:
        super().__init__(message)
        self.smallest = smallest

    @classmethod
    def of(cls, bounds: str, smallest: Plan, static_bytes: int) -> OverBudget:
        """Make the error.

        Args:
            bounds: the budget and the other bounds in words.
            smallest: the plan with the smallest peak.
            static_bytes: bytes that exist during the whole step under every choice.
        """
        peak = format_bytes(smallest.prediction.peak_bytes)
        choices = ", ".join(f"{kind} {choice}" for kind, choice, _ in smallest.summary())
        return cls(
            f"no policy fits {bounds}; the smallest possible peak is {peak}, with {choices}; "
            f"{format_bytes(static_bytes)} of the peak are static bytes: weights, inputs and "
            "optimizer states",
            smallest,
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted memory, time and error of a step.

    Args:
        saved_bytes: bytes saved for the backward on the device, each storage once.
        peak_bytes: most bytes allocated at once in a step: with weights, buffers, inputs,
            gradients, optimizer states and the kernels' workspace.
        step_s: seconds of forward and backward; None for a model on the meta device, or if plain
            does not fit the device.
        time_ratio: `step_s` divided by the seconds of the plain step, or None.
        gradient_error: relative L2 distance from the float32 gradient.
        offloaded_bytes: bytes in CPU memory between forward and backward.
    """

    saved_bytes: int
    peak_bytes: int
    step_s: float | None
    time_ratio: float | None
    gradient_error: float
    offloaded_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A policy and the prediction for it.

    Args:
        policy: for `wrap`.
        prediction: for a step with the policy.
        choices: by candidate: a number of bits, "keep" or "rebuild", or these offloaded; by block:
            its strategy.
        gap: proven bound on the distance of these choices from the best, relative to their cost.
        plain: prediction for a step without a policy.
        worst: of several batches, the number of the batch that the predictions are for, from 0.
    """

    policy: Policy
    prediction: Prediction
    choices: dict[Key, int | str]
    gap: float
    plain: Prediction
    worst: int = 0

    def of_batch(self, number: int) -> Plan:
        """The same plan with another number of its batch."""
        return dataclasses.replace(self, worst=number)

    @property
    def cost(self) -> float:
        """Time and gradient error in one number, as a multiple of the plain step's time."""
        prediction = self.prediction
        return (prediction.time_ratio or 0.0) + ERROR_WEIGHT * prediction.gradient_error**2

    def summary(self) -> list[tuple[str, str, int]]:
        """(operator.operand, choice, number of candidates), in the order of the model."""
        counts: dict[tuple[str, str], int] = {}
        for (_, operator, operand), choice in self.choices.items():
            label = f"{choice} bits" if isinstance(choice, int) else choice
            key = (f"{operator}.{operand}".rstrip("."), label)
            counts[key] = counts.get(key, 0) + 1
        return [(*key, count) for key, count in counts.items()]
