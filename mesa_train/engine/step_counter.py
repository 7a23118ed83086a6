"""Counts optimisation steps by their trace in the weights, for codecs whose state moves once a step.

Nobody tells a model that a step was taken. `torch.optim` has hooks for it, but DeepSpeed's engine, kernels
that write through pointers and optimizers that run inside the backward pass them by; a tensor's version
counts writes through PyTorch alone (DeepSpeed writes to a flat buffer behind the parameters). So a step is
what changes a weight: its version, or any of a few elements of it, is not what it was. A step that a
GradScaler skipped, a second micro-batch and a recompute change none.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.stash.sharded_parameters import local_shard

_SAMPLES = 8


class StepCounter:
    """`count` is how many steps `update` has seen, the first update among them."""

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[tuple[str, torch.Size], _Trace] = {}

    def update(self, model: nn.Module) -> None:
        """Count a step if trained weights of `model` have changed since the last update. Waits for the
        device: a few elements of each are compared. Under a fake tensor mode nothing can be compared."""
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
            # FSDP's parameters are now shards and now whole. Each form is compared with itself, and
            # one not met since the last step with nothing.
            self._known.update(found)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_known": {}}


class _Trace:
    """What a parameter was: the object, its version, and some of what it holds here."""

    __slots__ = ("parameter", "sample", "version")

    def __init__(self, parameter: Tensor, held: Tensor) -> None:
        self.parameter, self.version = weakref.ref(parameter), parameter._version
        self.sample: Tensor | None = None
        if type(held) in (Tensor, nn.Parameter) and not held.is_meta:
            flat = held.detach().reshape(-1)
            # As bytes, in which a NaN equals itself.
            some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()
            self.sample = some.view(torch.uint8)

    def differs(self, before: _Trace) -> bool:
        """Whether a step lies between `before` and this."""
        if before.parameter() is self.parameter() and before.version != self.version:
            return True
        if self.sample is None or before.sample is None:
            return False
        return not torch.equal(self.sample, before.sample.to(self.sample.device))
