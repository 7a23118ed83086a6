"""Batch norm over the images of all ranks, on any device.

PyTorch's SyncBatchNorm refuses tensors on a CPU. `CrossRankBatchNorm` computes the same statistics
with differentiable sums over the ranks. On a GPU, `synchronise` uses PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm by one over all ranks. Keys and values of the state dict stay.

    Args:
        module: changed in place.
        device: of the module.
    Returns:
        The module; the replacement if it is a batch norm itself.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm) and not isinstance(module, CrossRankBatchNorm):
        return CrossRankBatchNorm.of(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child, device))
    return module


class CrossRankBatchNorm(_BatchNorm):
    """Batch norm over the images of all ranks of the default process group.

    All ranks need inputs of one shape. Evaluation is that of an ordinary batch norm.
    """

    @classmethod
    def of(cls, norm: _BatchNorm) -> CrossRankBatchNorm:
        """The replacement of a batch norm, with its parameters and buffers."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
            setattr(new, name, value)
        new.train(norm.training)
        return new

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm needs at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverRanks.apply(x.sum(dims)) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of the batch."""
        buffers: Any = self
        buffers.num_batches_tracked += 1
        if self.momentum is None:
            weight = 1 / float(buffers.num_batches_tracked)
        else:
            weight = self.momentum
        buffers.running_mean.lerp_(mean.to(buffers.running_mean), weight)
        buffers.running_var.lerp_(variance.to(buffers.running_var), weight)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Each rank's gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  autograd's signature
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad
