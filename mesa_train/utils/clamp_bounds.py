"""Whether the gradient of PyTorch's clamp passes at a bound. It depends on the version of PyTorch."""

from __future__ import annotations

import torch


def _slope_at_bound() -> float:
    """The derivative of `clamp(x, max=1)` at 1."""
    # A user may import mesa_train under any mode.
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(x.clamp(max=1.0), x)
        return slope.item()


# True in PyTorch 2.11, False in PyTorch 2.14.
PASSES_AT_BOUNDS = _slope_at_bound() == 1
