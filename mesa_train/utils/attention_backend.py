"""What PyTorch's scaled dot product attention calls: its kernel, and its number for a masked score.

In eager mode `torch._fused_sdp_choice` returns the kernel. While a tracer runs, it returns "unfused"
for every call, because it sees fake tensors. The function that chooses inside
`scaled_dot_product_attention` is not called through the dispatcher. It reads the sizes, strides and
devices of fake tensors as it reads those of real ones. So this file calls the whole function on fake
tensors and records the kernel that it calls. No memory is allocated and no kernel runs.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# One tensor for `traced_kernel`: sizes, strides, dtype, whether it requires a gradient.
Description = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]

MATH, FLASH, EFFICIENT, CUDNN = "math", "flash", "efficient", "cudnn"

# The beginnings of the kernels' names in aten.
_KERNELS = {
    f"aten::_scaled_dot_product_{kernel}_attention": kernel for kernel in (FLASH, EFFICIENT, CUDNN)
}

# A size that the tracer does not know. All kernels accept a multiple of 8.
_UNKNOWN = 64


class _Calls(TorchDispatchMode):
    """Records the attention kernel and the numbers of scalar tensors.

    Attributes:
        kernel: the name of the kernel; "math" if none of the fused kernels is called.
        numbers: the numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = MATH
        self.numbers: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.scalar_tensor.default:
            self.numbers.append(float(args[0]))
        for name, kernel in _KERNELS.items():
            if func.name().startswith(name):
                self.kernel = kernel
        return func(*args, **(kwargs or {}))


def _fuses_three_dims() -> bool:
    """True if PyTorch has a fused kernel for q, k and v without a batch: it gives them one, and removes it."""
    # A user may import mesa_train under any mode.
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 2, 8, device="cpu", dtype=torch.float32, requires_grad=True)
        out = F.scaled_dot_product_attention(x, x, x)
    return type(out.grad_fn).__name__.startswith("Squeeze")


# False in PyTorch 2.11, True in PyTorch 2.14.
FUSES_3D = _fuses_three_dims()


def described(tensor: Tensor, requires_grad: bool) -> Description:
    """The description of a traced tensor.

    A size or stride that the tracer does not know is replaced by a number. The traced code then does
    not depend on it.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    sizes = tuple([n if has_static_value(n) else _UNKNOWN for n in tensor.shape])
    strides = tuple([n if has_static_value(n) else _UNKNOWN for n in tensor.stride()])
    return sizes, strides, tensor.dtype, requires_grad


def traced_kernel(
    device: str,
    query: Description,
    key: Description,
    value: Description,
    mask: Description | None,
    dropout: bool,
    causal: bool,
) -> str:
    """The kernel that PyTorch would call in eager mode: `MATH`, `FLASH`, `EFFICIENT` or `CUDNN`.

    Without a GPU, the kernel of a "cuda" device is `MATH`.
    """
    return _called(device, query, key, value, mask, dropout, causal).kernel


def cudnn_masked_score() -> float:
    """The number that PyTorch adds to a masked score before it calls cuDNN.

    Older versions add -65504, newer versions add minus infinity. The two differ if a bool mask masks
    all keys of a query.
    """
    return _cudnn_masked_score()


# Dynamo calls these functions while tracing, and does not trace them. See `ops/fallback.py`.
traced_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]
cudnn_masked_score._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cudnn_masked_score() -> float:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    operand = ((1, 1, _UNKNOWN, _UNKNOWN), (_UNKNOWN**2, _UNKNOWN**2, _UNKNOWN, 1))
    half, mask = (*operand, torch.float16, True), (*operand, torch.bool, False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            warnings.simplefilter("ignore")
            calls = _called("cuda", half, half, half, mask, False, False)
    except RuntimeError:  # cuDNN has no attention for this GPU
        return -math.inf
    return min(calls.numbers, default=-math.inf)


def _called(
    device: str,
    query: Description,
    key: Description,
    value: Description,
    mask: Description | None,
    dropout: bool,
    causal: bool,
) -> _Calls:
    """What `scaled_dot_product_attention` calls for such tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The modes of the traced code, mesa_train's among them, must not see this call.
    with (
        torch._C.DisableTorchFunction(),
        torch.autocast(device, enabled=False),
        torch.enable_grad(),
        FakeTensorMode(),
        _Calls() as calls,
    ):
        q, k, v = [_fake(t, device) for t in (query, key, value)]
        bias = None if mask is None else _fake(mask, device)
        torch._C._nn.scaled_dot_product_attention(q, k, v, bias, 0.5 if dropout else 0.0, causal)
    return calls


def _fake(description: Description, device: str) -> Tensor:
    """A tensor as described; under a fake tensor mode, without memory."""
    sizes, strides, dtype, requires_grad = description
    return torch.empty_strided(
        sizes, strides, dtype=dtype, device=device, requires_grad=requires_grad
    )
