"""Fake tensors that stand for a device: no data and no memory, and the bytes of the real ones.

PyTorch's FakeTensorMode picks nearly the same kernels for a fake of the CPU as the CPU would. Where
it does not, it is corrected here, so that what is counted on fakes is what a real run keeps:

* `torch._fused_sdp_choice` answers "unfused" for fakes, though `scaled_dot_product_attention`
  itself does choose for them as the device would;
* the statistics of a norm whose input is narrower than its weight are float32 on the CPU.

What stays different: with a batch of one, elementwise operators on fakes normalise the stride of
the batch, and a convolution behind them may choose another memory layout; a recurrent layer's
kernel keeps a workspace that fakes do not show.

`gpu_norms` counts RMS norm as a GPU keeps it: one kernel that saves its input, the gain and the reciprocal
deviations. On a CPU RMS norm is several operators, each of which saves something.
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

# What `torch._fused_sdp_choice` calls the kernels; everything else is 0, the unfused form.
_ATTENTION_KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_efficient_attention": 2,
    "_scaled_dot_product_cudnn_attention": 3,
}

# What fakes raise where a model reads values. The second, a plain RuntimeError, where it leaves torch.
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
    """Makes fakes of tensors on `device`, one for each tensor, so that tied weights stay tied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within the context fakes can be computed with, and new tensors are fakes."""
        with self._mode, _NormStatistics(), _attention_choice():
            yield

    def of(self, value: Any) -> Any:
        """`value` with every tensor in it replaced by its fake; anything else as it is."""
        return pytree.tree_map_only(Tensor, self._one, value)

    def _one(self, tensor: Tensor) -> Tensor:
        # The tensor is held beside its fake: its id stays taken for as long as the table lives.
        if id(tensor) not in self._made:
            if tensor.is_nested:
                raise ValueError("nested tensors have no fakes: count with fake=False")
            with self._mode:
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
                )
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                else:
                    fake.requires_grad_(tensor.requires_grad)
            self._made[id(tensor)] = (tensor, fake)
        return self._made[id(tensor)][1]


@contextlib.contextmanager
def _attention_choice() -> Iterator[None]:
    """Within the context `torch._fused_sdp_choice` answers for fakes by what
    `scaled_dot_product_attention` runs. Not a function mode: a checkpoint's second forward, which
    the autograd engine runs, would not find it on."""
    own = torch._fused_sdp_choice

    def choice(query: Tensor, *args: Any, **kwargs: Any) -> int:
        if not isinstance(query, FakeTensor):
            return own(query, *args, **kwargs)
        with torch.no_grad(), _Called() as called:
            F.scaled_dot_product_attention(query, *args, **kwargs)
        return next((n for name, n in _ATTENTION_KERNELS.items() if name in called.names), 0)

    torch._fused_sdp_choice = choice
    try:
        yield
    finally:
        torch._fused_sdp_choice = own


class _Called(TorchDispatchMode):
    """Remembers the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _NormStatistics(TorchDispatchMode):
    """Makes mean and reciprocal deviation float32 where the CPU does."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile may run under this mode, as eager `flex_attention` does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func not in _NORMS or args[0].device.type != "cpu":
            return results
        if all(t.dtype is args[0].dtype for t in args[1:] if isinstance(t, Tensor)):
            return results
        output, mean, rstd, *more = results
        return output, mean.float(), rstd.float(), *more


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
