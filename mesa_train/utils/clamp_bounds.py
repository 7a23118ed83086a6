"""The gradient of PyTorch's clamp at a bound, which depends on the version of PyTorch."""

from __future__ import annotations

from typing import Any

import torch


def _slope_at_bound() -> float:
    """The derivative of `clamp(x, max=1)` at 1."""
    # A user may import mesa_train under any mode.
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), device="cpu", requires_grad=True)
        node: Any = x.clamp(max=1.0).grad_fn
        # The node alone: a backward would start the threads of autograd, after which a fork is not
        # possible where there is a GPU.
        return node(torch.ones((), device="cpu")).item()


# True in PyTorch 2.11, False in PyTorch 2.14.
PASSES_AT_BOUNDS = _slope_at_bound() == 1
