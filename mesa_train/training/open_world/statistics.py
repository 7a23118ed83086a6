"""Batch norm statistics of several processes, equal to those of one process.

Batch norm normalises by the statistics of a micro-batch, so losses do not depend on the number of
processes. Its running statistics do: each process sees its own micro-batches alone. Evaluations and
checkpoints would have the first process's.

`RunningStatistics.merge` gives all processes the running statistics of one process that sees the
micro-batches of all ranks in turn. A batch changes running statistics r to `keep r + d`, where `keep`
is 1 - momentum and d does not depend on r. So d follows from r before and after. The cost is an
all-gather of the running statistics for each micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """The running statistics of a model's batch norms.

    Norms without running statistics or with a cumulative average (`momentum=None`) are left out.

    Args:
        model: its modules stay; a norm in evaluation mode does not change.
        world: number of processes.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        self.world, self.before = world, list[Tensor]()
        self.norms: list[_BatchNorm] = []
        if world > 1:
            self.norms = [
                module
                for module in model.modules()
                if isinstance(module, _BatchNorm)
                and module.running_mean is not None
                and module.momentum is not None
            ]

    def remember(self) -> None:
        """Keep the statistics before a micro-batch, which are equal on all processes."""
        self.before = [buffer.clone() for norm in self.norms for buffer in _buffers(norm)]

    def merge(self) -> None:
        """Give all processes the statistics after the micro-batches of all of them.

        Every process must have run its micro-batch, backward included, since `remember`.
        """
        if not self.norms:
            return
        own = torch.cat([b.float() for norm in self.norms for b in _buffers(norm)[:2]])
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        start = 0
        for index, norm in enumerate(self.norms):
            mean, variance, count = self.before[3 * index : 3 * index + 3]
            now = _buffers(norm)
            # Recomputation in a backward runs a norm twice.
            calls = int(now[2] - count)
            for buffer, old in zip(now[:2], (mean, variance), strict=True):
                found = [part[start : start + len(old)] for part in parts]
                start += len(old)
                if calls:
                    buffer.copy_(in_turn(old.float(), found, (1 - float(norm.momentum)) ** calls))  # type: ignore[arg-type]
            now[2].copy_(count + calls * self.world)


def in_turn(before: Tensor, after: list[Tensor], keep: float) -> Tensor:
    """Running statistics after the updates of all ranks, one after the other.

    Args:
        before: statistics that all ranks had, (C,).
        after: of each rank after its own update, (C,) each.
        keep: factor of the old statistics in an update.
    Returns:
        (C,).
    """
    result = before
    for own in after:
        result = keep * result + (own - keep * before)
    return result


def _buffers(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance and number of batches."""
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and count is not None  # noqa: PT018
    return mean, variance, count
