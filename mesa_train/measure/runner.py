"""Run real steps of one model with any method: gradients, peak memory, workspace and seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.methods.apply import PLAIN, applied
from mesa_train.policy import Policy

from .isolation import isolated
from .peak import Workspace, peak_of, workspace_of
from .step import Step, device_of
from .timeline import Timeline


class StepRunner:
    """Real steps of one model on one batch, all with the same random numbers and buffers.

    Args:
        model: the module; it is unchanged after each call.
        inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        autocast: the dtype of autocast; None runs without autocast.
        loss: from the output to a scalar.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        autocast: torch.dtype | None,
        loss: Callable[[Any], Tensor],
    ) -> None:
        self.model, self.inputs, self.autocast, self.loss = model, inputs, autocast, loss
        self.device = device_of(model)
        self.step = Step(self.device, autocast, loss)

    def reference(self) -> list[Tensor | None]:
        """The plain gradient in float32; a model with narrower weights is copied for it."""
        if all(p.dtype.itemsize >= 4 for p in self.model.parameters()):
            return StepRunner(self.model, self.inputs, None, self.loss).gradients(PLAIN)
        float32_model = copy.deepcopy(self.model).float()
        inputs = pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.is_floating_point() else t, self.inputs
        )
        return StepRunner(float32_model, inputs, None, self.loss).gradients(PLAIN)

    def gradients(self, method: Policy | str) -> list[Tensor | None]:
        """Run a step and return its gradients.

        Args:
            method: a Policy or the name of a method.

        Returns:
            The gradient of each trained parameter; None if the loss does not depend on it.
        """
        with applied(self.model, method), isolated(self.model):
            return self.step.gradients(self.model, self.inputs)

    def peak(self, method: Policy | str) -> int:
        """Run a step and return its peak.

        Args:
            method: a Policy or the name of a method.

        Returns:
            Most bytes allocated at once in the step, beyond the bytes allocated before it.
        """
        # Memory that is allocated once and stays does not count for the step.
        self.gradients(method)
        with applied(self.model, method), isolated(self.model):
            return peak_of(self._run, self.device).allocated_bytes

    def workspace(self, method: Policy | str, counted: Timeline) -> Workspace:
        """Run a step and return its workspace.

        Args:
            method: a Policy or the name of a method.
            counted: timeline of the same step on fake tensors.

        Returns:
            Bytes beyond the counted bytes, by moment.
        """
        self.gradients(method)
        with applied(self.model, method), isolated(self.model):
            return workspace_of(self.model, self._run, self.device, counted)

    def times(
        self,
        methods: Sequence[Policy | str],
        rounds: int,
        report: Callable[[str], None] = lambda _: None,
    ) -> list[list[float]]:
        """Time steps of all methods in turns, after one step of each that warms up.

        Args:
            methods: the methods to time.
            rounds: number of timed steps of each method.
            report: called with a line of progress before every round.

        Returns:
            Seconds of `rounds` steps for each method.
        """
        times: list[list[float]] = [[] for _ in methods]
        for number in range(rounds + 1):
            report(f"time: round {number} of {rounds}" if number else "time: warming up")
            for method, seconds in zip(methods, times, strict=True):
                with applied(self.model, method), isolated(self.model):
                    step_s = self.step.seconds(self._run)
                if number:
                    seconds.append(step_s)
        return times

    def _run(self) -> list[Tensor | None]:
        """Run one step."""
        # autograd.grad, not .backward(): the user's .grad fields do not change.
        return self.step.gradients(self.model, self.inputs)
