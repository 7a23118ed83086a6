"""A counter of optimizer steps, for codecs whose state changes once a step.

Why: a model is not informed of optimizer steps. `torch.optim` has hooks, but DeepSpeed's engine,
kernels that write through pointers and optimizers in the backward do not use them. A tensor's
version counts only writes through PyTorch, and DeepSpeed writes to a flat buffer behind the
parameters.

How: a step is counted if a trained weight has changed. A weight has changed if its version or one
of a few sampled elements differs. A step that a GradScaler skipped, a second micro-batch and a
recompute change no weight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.stash.sharded_parameters import local_shard

_SAMPLES = 8


class StepCounter:
    """Counts optimizer steps.

    Attributes:
        count: the number of steps that `update` has counted. The first update counts as a step.
    """

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[tuple[str, torch.Size], _Trace] = {}

    def update(self, model: nn.Module) -> None:
        """Count a step if trained weights of `model` have changed since the last update.

        Waits for the device, because a few elements of each weight are compared. Under a fake
        tensor mode nothing can be compared, and nothing is counted.
        """
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return
        found: dict[tuple[str, torch.Size], _Trace] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                held = local_shard(parameter)
                found[name, held.shape] = _Trace(parameter, held)
        moved = any(
            [key in self._known and trace.differs(self._known[key]) for key, trace in found.items()]
        )
        if moved or not self.count:
            self.count += 1
            self._known = found
        else:
            # FSDP's parameters alternate between shards and full parameters. Each form is compared
            # with the same form. A form that is new since the last step is compared with nothing.
            self._known.update(found)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_known": {}}


class _Trace:
    """A parameter's state: the object, its version, and a few elements of its local shard."""

    __slots__ = ("parameter", "sample", "version")

    def __init__(self, parameter: Tensor, held: Tensor) -> None:
        self.parameter, self.version = weakref.ref(parameter), parameter._version
        self.sample: Tensor | None = None
        if type(held) in (Tensor, nn.Parameter) and not held.is_meta:
            flat = held.detach().reshape(-1)
            # Compared as bytes, because a NaN equals itself only as bytes.
            some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()
            self.sample = some.view(torch.uint8)

    def differs(self, before: _Trace) -> bool:
        """True if a step happened between `before` and this trace."""
        if before.parameter() is self.parameter() and before.version != self.version:
            return True
        if self.sample is None or before.sample is None:
            return False
        return not torch.equal(self.sample, before.sample.to(self.sample.device))
