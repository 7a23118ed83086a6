"""The end of an optimizer step: clip the gradients and step, in a graph or behind it.

One graph serves all shapes of batches, because it reads the static gradients only. The learning
rate is a tensor in the graph. Before each replay the tensor takes the value of
`param_groups[i]["lr"]`, so a schedule that writes floats works. All other hyperparameters are
constants of the graph. A change of one is an error.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backend import captured
from .checks import CaptureError
from .gradients import Gradients


class Update:
    """The optimizer's part of a captured step.

    Args:
        optimizer: a `torch.optim.Optimizer`, or None: gradients are clipped only.
        scaler: an enabled `torch.amp.GradScaler`, or None.
        clip_norm: largest norm of the gradients, or None.
        in_graph: whether the step is captured.
        warmup: eager optimizer steps before the capture.
    Attributes:
        grad_norm: norm of the last gradients before clipping, a scalar; None without `clip_norm`.
    """

    def __init__(
        self, optimizer: Any, scaler: Any, clip_norm: float | None, in_graph: bool, warmup: int
    ) -> None:
        self.optimizer, self.scaler, self.clip_norm = optimizer, scaler, clip_norm
        self.in_graph, self.warmup = in_graph, warmup
        self.rates: LearningRates | None = None
        self.grad_norm: Tensor | None = None
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._norm: Tensor | None = None
        self._constants: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Drop the graph. The next steps warm up again."""
        self._replay, self._norm, self._runs, self.rates = None, None, 0, None

    def run(self, backend: Any, gradients: Gradients) -> None:
        """Clip and step.

        Args:
            backend: a `CudaGraphs`.
            gradients: of the model.
        """
        if not self.in_graph:
            self.grad_norm = self._plain(gradients.parameters)
            return
        if self._replay is not None:
            self._check_constants()
        elif self.rates is None or len(self.rates.static) != len(self.optimizer.param_groups):
            self.rates = LearningRates(self.optimizer, backend.device)
        assert self.rates is not None
        self.rates.refresh()

        def step() -> Tensor | None:
            assert self.rates is not None
            gradients.attach()
            norm = self._clipped(gradients.parameters)
            with self.rates.installed():
                self.optimizer.step()
            return norm

        if self._replay is None and gradients.bound and self._runs >= self.warmup:
            self._replay, self._norm = captured(backend, step, "the optimizer's step")
            self._constants = constants(self.optimizer)
        self._runs += 1
        if self._replay is None:
            with _without_advice():
                self.grad_norm = backend.eager(step)
            return
        self._replay()
        self.grad_norm = None if self._norm is None else self._norm.clone()

    def _clipped(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """Clip the gradients. Returns their norm before; None without clipping."""
        if self.clip_norm is None:
            return None
        return nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def _plain(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """Clip and step as in a plain loop, on the current stream."""
        if self.scaler is not None and self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._clipped(parameters)
        if self.optimizer is None:
            return norm
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return norm

    def _check_constants(self) -> None:
        """Raise CaptureError if a hyperparameter other than the learning rate has changed."""
        now = constants(self.optimizer)
        if len(now) != len(self._constants):
            raise CaptureError("the optimizer has another number of groups; call reset()")
        for number, (before, after) in enumerate(zip(self._constants, now, strict=True)):
            for name, value in before.items():
                if after[name] != value:
                    raise CaptureError(
                        f"param_groups[{number}]['{name}'] has changed from {value} to "
                        f"{after[name]}, a constant of the graph; call reset() on the step, or "
                        "pass optimizer_in_graph=False if a schedule changes it"
                    )


class LearningRates:
    """One scalar tensor on the device for each group of an optimizer.

    Args:
        optimizer: its groups have a number or a tensor as "lr".
        device: of the tensors.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.optimizer = optimizer
        self.static = [
            torch.empty((), dtype=torch.float32, device=device) for _ in optimizer.param_groups
        ]
        self._last: list[float | None] = [None] * len(self.static)

    def refresh(self) -> None:
        """Copy the groups' rates to the tensors. A number is copied only if it has changed."""
        for index, static in enumerate(self.static):
            rate = self.optimizer.param_groups[index]["lr"]
            if isinstance(rate, Tensor):
                static.copy_(rate.detach().view(()), non_blocking=True)
            elif rate != self._last[index]:
                static.fill_(rate)
                self._last[index] = rate

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Context manager: the groups' rates are the tensors."""
        before = [group["lr"] for group in self.optimizer.param_groups]
        for group, static in zip(self.optimizer.param_groups, self.static, strict=True):
            group["lr"] = static
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, before, strict=True):
                group["lr"] = rate


def constants(optimizer: Any) -> list[dict[str, Any]]:
    """The hyperparameters of each group that a graph holds as numbers, and the group's size."""
    found = []
    for group in optimizer.param_groups:
        names = [name for name in optimizer.defaults if name != "lr" and name in group]
        values = {n: group[n] for n in names if not _has_tensor(group[n])}
        found.append(values | {"number of parameters": len(group["params"])})
    return found


def _has_tensor(value: Any) -> bool:
    """True for a tensor and for a tuple with a tensor."""
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) for v in values)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Context manager: without PyTorch's warning that a capturable optimizer runs uncaptured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        yield
