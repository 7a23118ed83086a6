"""Compare: methods side by side on one model and one batch: bytes saved, gradient error, step time.

Bytes come from `footprint` and are exact. The gradient error is one real backward per method
against the plain float32 gradient of the same batch and the same random numbers. Times are forward
plus backward, measured in rounds that run every method once, so that a machine that slows down
slows all of them: only ratios within a round are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time as clock
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.methods.apply import METHODS, PLAIN, applied, check_method
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.policy import Policy

from .footprint import footprint
from .isolation import isolated
from .peak import Workspace, peak_of, workspace_of
from .step import arguments, autocasting, device_of
from .step import default_loss as default_loss
from .step import relative_error as relative_error
from .timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's measurements; None is what was not asked for or cannot be had (see `notes`).

    saved_bytes: saved for the backward, each storage once.
    saved_ratio: how many times less than plain.
    gradient_error: relative L2 distance from the plain float32 gradient over all parameters.
    time_ms: median of forward plus backward.
    time_ratio: median over the rounds of this method's time by plain's.
    """

    method: str
    saved_bytes: int | None
    saved_ratio: float | None = None
    gradient_error: float | None = None
    time_ms: float | None = None
    time_ratio: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return dataclasses.asdict(self)


def compare(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[str] = METHODS,
    *,
    autocast: torch.dtype | None = None,
    fake: bool = False,
    device: str | torch.device | None = None,
    error: bool = True,
    time: bool = True,
    rounds: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Measure `methods` on `model(inputs)`, one Row each in their order; the model stays as it was.

    inputs, autocast, fake, device: as for `footprint`; fakes, and a model on the meta device, give
        bytes alone.
    loss: from the output to a scalar, for the real steps; default: `default_loss`.
    rounds: timed runs of every method, after one that warms up.
    progress: called before every step with what it is, its number from 0 and how many there are,
        and once at the end.

    Raises ValueError for an unknown method, no method or rounds < 1, and what `footprint` raises.
    """
    if not methods:
        raise ValueError(f"compare() needs a method; choose from {', '.join(METHODS)}, or a preset")
    for method in methods:
        check_method(method)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    real = not (fake or device_of(model).type == "meta")
    steps = _Steps(progress, len(methods), error and real, time and real, rounds)
    count = functools.partial(footprint, model, inputs, autocast=autocast, fake=fake, device=device)
    steps.next(f"bytes: {PLAIN}")
    plain = count(policy=PLAIN)
    results: dict[str, Row] = {}
    for method in methods:
        steps.next(f"bytes: {method}")
        try:
            found = plain if method == PLAIN else count(policy=method)
        except NoBlocks as reason:
            results[method] = Row(method, None, notes=(str(reason),))
            continue
        ratio = plain.saved_bytes / found.saved_bytes if found.saved_bytes else None
        results[method] = Row(method, found.saved_bytes, ratio, notes=found.notes)
    run = Runs(model, inputs, autocast, loss or default_loss)
    usable = [method for method, row in results.items() if row.saved_bytes is not None]
    if error and real:
        steps.next("gradient: float32")
        reference = run.reference()
        for method in usable:
            steps.next(f"gradient: {method}")
            distance = relative_error(run.gradients(method), reference)
            results[method] = dataclasses.replace(results[method], gradient_error=distance)
    if time and real:
        every = usable if PLAIN in usable else [PLAIN, *usable]
        times = dict(zip(every, run.times(every, rounds, steps.next), strict=True))
        for method in usable:
            results[method] = dataclasses.replace(
                results[method],
                time_ms=1e3 * statistics.median(times[method]),
                time_ratio=statistics.median(
                    own / plain for own, plain in zip(times[method], times[PLAIN], strict=True)
                ),
            )
    steps.finish()
    return [results[method] for method in methods]


class Runs:
    """Real steps of one model on one batch, all with the same random numbers and buffers."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        autocast: torch.dtype | None,
        loss: Callable[[Any], Tensor],
    ) -> None:
        self.model, self.inputs, self.autocast, self.loss = model, inputs, autocast, loss
        self.device = device_of(model)

    def reference(self) -> list[Tensor | None]:
        """The plain gradient in float32; a model with narrower weights is copied for it."""
        if all(p.dtype.itemsize >= 4 for p in self.model.parameters()):
            return Runs(self.model, self.inputs, None, self.loss).gradients(PLAIN)
        wide = copy.deepcopy(self.model).float()
        inputs = pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.is_floating_point() else t, self.inputs
        )
        return Runs(wide, inputs, None, self.loss).gradients(PLAIN)

    def gradients(self, method: Policy | str) -> list[Tensor | None]:
        """The gradient of all trainable parameters, None where the loss does not depend on one."""
        with applied(self.model, method), isolated(self.model):
            return self._step()

    def peak(self, method: Policy | str) -> int:
        """Most bytes allocated at once in a step, beyond what was before it."""
        self.gradients(method)  # What is allocated once and stays is not the step's.
        with applied(self.model, method), isolated(self.model):
            return peak_of(self._step, self.device).allocated_bytes

    def scratch(self, method: Policy | str, counted: Timeline) -> Workspace:
        """What a step allocates beyond what was counted, moment by moment."""
        self.gradients(method)
        with applied(self.model, method), isolated(self.model):
            return workspace_of(self.model, self._step, self.device, counted)

    def times(
        self,
        methods: Sequence[Policy | str],
        rounds: int,
        tell: Callable[[str], None] = lambda _: None,
    ) -> list[list[float]]:
        """Seconds of `rounds` steps for each method, taking turns, after one that warms up."""
        times: list[list[float]] = [[] for _ in methods]
        for number in range(rounds + 1):
            tell(f"time: round {number} of {rounds}" if number else "time: warming up")
            for method, own in zip(methods, times, strict=True):
                with applied(self.model, method), isolated(self.model):
                    self._synchronize()
                    start = clock.perf_counter()
                    self._step()
                    self._synchronize()
                    taken = clock.perf_counter() - start
                if number:
                    own.append(taken)
        return times

    def _step(self) -> list[Tensor | None]:
        args, kwargs = arguments(self.inputs)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # float16 gradients of a mean over a batch may vanish: scale them as a GradScaler would.
        scale = 2.0**12 if self.autocast is torch.float16 else 1.0
        torch.manual_seed(0)
        with autocasting(self.device, self.autocast):
            value = self.loss(self.model(*args, **kwargs))
        # Not .backward(): the user's .grad fields are none of our business.
        grads = torch.autograd.grad(value * scale, parameters, allow_unused=True)
        return [None if g is None else g / scale for g in grads] if scale != 1 else list(grads)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Steps:
    """Counts what `progress` is told."""

    def __init__(
        self,
        progress: Callable[[str, int, int], None] | None,
        methods: int,
        error: bool,
        time: bool,
        rounds: int,
    ) -> None:
        self.progress = progress
        self.total = methods + 1 + error * (methods + 1) + time * (rounds + 1)
        self.done = 0

    def next(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += 1

    def finish(self) -> None:
        if self.progress is not None:
            self.progress("done", self.total, self.total)
