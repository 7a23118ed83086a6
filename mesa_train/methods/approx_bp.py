"""Approx-BP, a baseline: GELU and SiLU that save two bits an element.

Yang et al., "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing
Backpropagation" (ICML 2024, arXiv 2406.16282). The forward is PyTorch's. The backward replaces the
derivative by a function of four steps, so two bits say which step an input is on. Thresholds and
steps are copied from the authors' code (github.com/yyyyychen/LowMemoryBP,
lomem/csrc/activation_cuda.cu).

The other half of the paper is left out. There, a norm shares its output with the Linear behind it,
and its weight and bias are merged into that Linear. So other parameters are trained, and there is
no gradient to compare.

This file reproduces the method's saved bytes and gradient error, but not its time: it uses torch
operators and this library's bit masks, not the authors' CUDA kernels. The method is meant for
fine-tuning: the error falls as the inputs spread (standard deviation 0.4 in a ViT with random
weights).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mesa_train.codecs import bitmask

REMARK = (
    "timed with torch operators, not with the authors' CUDA kernels; random weights put GELU's input "
    "near 0, where four steps approximate its derivative worst"
)

# Three thresholds, and the rise of the derivative at each.
_GELU = (
    (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
    (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
)
_SILU = (
    (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
    (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
)
_STEPS: dict[Any, tuple[tuple[float, ...], tuple[float, ...]]] = {F.gelu: _GELU, F.silu: _SILU}


class ApproxBP(TorchFunctionMode):
    """Within the context, exact gelu and silu save two bits an element."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _STEPS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        default = len(args) == 1 and all(v in ("none", False) for v in kwargs.values())
        if not default or not args[0].requires_grad:
            return func(*args, **kwargs)
        return _Stepped.apply(args[0], func)


class _Stepped(torch.autograd.Function):
    """An activation with a stepped derivative; saves two bit masks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, func: Any) -> Tensor:
        (low, middle, high), ctx.rises = _STEPS[func]
        upper, inner = x > middle, (x > low) & (x <= high)
        ctx.save_for_backward(bitmask.encode(upper), bitmask.encode(inner))
        return func(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        upper, inner = (bitmask.decode(bits, tuple(grad.shape)) for bits in ctx.saved_tensors)
        first, second, third = ctx.rises
        beyond = torch.where(upper, first + second + third, 0.0)
        slope = torch.where(inner, torch.where(upper, first + second, first), beyond)
        return grad * slope.to(grad.dtype), None
