"""Make fake tensors that stand for a device: no data, no memory, the bytes of the real tensors.

A count on fake tensors must equal the bytes that a real run saves. PyTorch's FakeTensorMode picks
nearly the same kernels for a fake CPU tensor as the CPU does. This file corrects the two
differences:

* `torch._fused_sdp_choice` answers "unfused" for fake tensors, although
  `scaled_dot_product_attention` itself chooses for them as the device does;
* on the CPU, the statistics of a norm are float32 if its input is narrower than its weight.

Two differences stay:

* with a batch of one, elementwise operators on fake tensors normalise the stride of the batch, so a
  later convolution may choose another memory layout;
* the kernel of a recurrent layer keeps a workspace that fake tensors do not show.

`gpu_norms` counts RMS norm as on a GPU: one kernel that saves its input, the gain and the
reciprocal deviations. On a CPU, RMS norm is several operators, and each of them saves something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Kernel numbers that `torch._fused_sdp_choice` returns. Every other kernel is 0, the unfused form.
_ATTENTION_KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_efficient_attention": 2,
    "_scaled_dot_product_cudnn_attention": 3,
}

# Exceptions of fake tensors if a model reads values.
FAKES_CANNOT = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
NUMPY = ".numpy() is not supported"

_aten = torch.ops.aten
_NORMS = (
    _aten.native_layer_norm.default,
    _aten.native_group_norm.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._batch_norm_with_update.default,
)


class FakeModel:
    """Makes fake tensors on a device, one for each real tensor, so that tied weights stay tied.

    Args:
        device: the device that the fake tensors stand for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within the context, operators run on fake tensors, and each new tensor is fake."""
        with self._mode, _NormStatistics(), _attention_choice():
            yield

    def of(self, value: Any) -> Any:
        """Replace every tensor by its fake tensor.

        Args:
            value: tensors in any container; other values stay as they are.
        """
        return pytree.tree_map_only(Tensor, self._fake_of, value)

    def _fake_of(self, tensor: Tensor) -> Tensor:
        """The fake tensor of one tensor; made at the first call."""
        # The table holds the real tensor too, so that Python does not give its id to another
        # tensor.
        if id(tensor) not in self._fakes:
            if tensor.is_nested:
                raise ValueError("PyTorch has no fake nested tensors; count with fake=False")
            with self._mode:
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
                )
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                else:
                    fake.requires_grad_(tensor.requires_grad)
            self._fakes[id(tensor)] = (tensor, fake)
        return self._fakes[id(tensor)][1]


@contextlib.contextmanager
def _attention_choice() -> Iterator[None]:
    """Within the context, `torch._fused_sdp_choice` returns the true choice for fake tensors.

    The true choice is the kernel that `scaled_dot_product_attention` runs. A function mode does not
    work here: the autograd engine runs a checkpoint's second forward, and the mode is off there.
    """
    original = torch._fused_sdp_choice

    def choice(query: Tensor, *args: Any, **kwargs: Any) -> int:
        if not isinstance(query, FakeTensor):
            return original(query, *args, **kwargs)
        with torch.no_grad(), _Called() as operators:
            F.scaled_dot_product_attention(query, *args, **kwargs)
        return next(
            (number for name, number in _ATTENTION_KERNELS.items() if name in operators.names), 0
        )

    torch._fused_sdp_choice = choice
    try:
        yield
    finally:
        torch._fused_sdp_choice = original


class _Called(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _NormStatistics(TorchDispatchMode):
    """Makes mean and reciprocal deviation float32 if the CPU does so."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile run under this mode, as eager `flex_attention` needs."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func not in _NORMS or args[0].device.type != "cpu":
            return results
        if all(t.dtype is args[0].dtype for t in args[1:] if isinstance(t, Tensor)):
            return results
        output, mean, rstd, *rest = results
        return output, mean.float(), rstd.float(), *rest


@contextlib.contextmanager
def gpu_norms() -> Iterator[None]:
    """Within the context, `torch.nn.functional.rms_norm` saves and allocates as a GPU kernel does.

    It computes nothing. A function mode does not work here: it is off in a checkpoint's second
    forward.
    """
    original = torch.rms_norm

    def rms_norm(
        x: Tensor, normalized_shape: Any, weight: Tensor | None = None, _: Any = None
    ) -> Any:
        return _RmsNorm.apply(x, len(normalized_shape), weight)

    torch.rms_norm = rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rms_norm = original


class _RmsNorm(torch.autograd.Function):
    """RMS norm on fake tensors: saves the input, the gain and one float32 deviation a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, weight: Tensor | None) -> Tensor:
        deviation = x.new_empty(x.shape[:-dims], dtype=torch.float32)
        ctx.save_for_backward(x, weight, deviation)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # noqa: ARG004
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, None if weight is None else torch.empty_like(weight)
