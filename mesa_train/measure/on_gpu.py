"""What a GPU's kernels keep where a CPU's are made of many operators: for counting on tensors without
data that stand for those of a CPU.

RMS norm is one kernel on a GPU, which keeps its input, the gain and the reciprocal deviations. On a
CPU it is several operators, each of which keeps something: a plain ViT-22B would seem to keep 1.7
times as much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def gpu_norms() -> Iterator[None]:
    """Within the context `torch.nn.functional.rms_norm` keeps and allocates as a GPU's kernel does;
    nothing is computed. Not a function mode: a checkpoint's second forward would not find it on."""
    own = torch.rms_norm

    def rms_norm(
        x: Tensor, normalized_shape: Any, weight: Tensor | None = None, _: Any = None
    ) -> Any:
        return _RmsNorm.apply(x, len(normalized_shape), weight)

    torch.rms_norm = rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rms_norm = own


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, weight: Tensor | None) -> Tensor:
        deviation = x.new_empty(x.shape[:-dims], dtype=torch.float32)
        ctx.save_for_backward(x, weight, deviation)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # noqa: ARG004
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, None if weight is None else torch.empty_like(weight)
