"""The generic fallback: whatever PyTorch saves for an operator without a row is coded on its way into the graph.

A saved-tensor hook codes float tensors (never below 8 bits) and packs bools to bits; parameters, autocast's weight
copies and small tensors pass. A tensor whose stash is known shares it. If somebody else's hooks are active (offload,
checkpointing, a byte counter), the codes go through them, so that they free, move or count codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codecs import bitmask
from ..stash import Spec, Stash, strip, value

if TYPE_CHECKING:
    from ..intercept import Interception

# Functions that save nothing of size, or whose saved tensors must stay exact (a loss seeds the whole backward).
_PASS = frozenset(
    """
    add add_ sub sub_ rsub neg neg_ __get__ __set__ __setitem__ copy_ fill_ zero_ requires_grad_ backward detach
    detach_ size dim ndim numel stride element_size data_ptr is_contiguous is_floating_point is_complex item tolist
    __len__ __hash__ __repr__ __format__ __bool__ __iter__ nelement storage_offset untyped_storage get_device
    register_hook retain_grad eq ne lt le gt ge isnan isinf isfinite all any argmax argmin argsort zeros_like
    ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor
    sum mean cat stack concat concatenate hstack vstack repeat tile masked_fill masked_fill_ cumsum type_as expand_as
    view_as reshape_as interpolate upsample unfold fold meshgrid numpy cpu cuda type is_inference
    add_scalar log_softmax cross_entropy nll_loss nll_loss_nd binary_cross_entropy binary_cross_entropy_with_logits
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss multi_margin_loss ctc_loss gaussian_nll_loss
    cosine_embedding_loss triplet_margin_loss hinge_embedding_loss poisson_nll_loss margin_ranking_loss logsumexp
    multilabel_margin_loss multilabel_soft_margin_loss mul mul_ div div_ embedding
    """.split()
)
_DIVISION = frozenset(["div", "div_", "mul", "mul_"])


def fallback(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` with the coding hooks on, unless it saves nothing worth it."""
    name = getattr(func, "__name__", "")
    if (name in _PASS and not (name in _DIVISION and _both_tracked(args))) or not mode.site.rules.operators["fallback"]:
        return func(*args, **kwargs)
    if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return func(*args, **kwargs)
    hooks = _Hooks(mode, name)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, _unpack):
        return func(*args, **kwargs)


class _Hooks:
    """The pack hook of one call."""

    def __init__(self, mode: Interception, name: str) -> None:
        self.mode, self.name = mode, name
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(self, tensor: Tensor) -> _Packed:
        with torch.no_grad():
            kept = self._kept(tensor)
        tensors: list[Tensor] = []
        specs: dict[int, Spec] = {}
        spec = strip(kept, tensors, {}, specs) if isinstance(kept, Stash) else None
        shape = None
        if spec is None:
            bits, shape = kept if isinstance(kept, tuple) else (kept, None)
            tensors = [bits]
        if self.outer is None:
            return _Packed(tensors, spec, shape, None)
        wrap, unwrap = self.outer
        return _Packed([wrap(t) for t in tensors], spec, shape, unwrap)

    def _kept(self, tensor: Tensor) -> Stash | Tensor | tuple[Tensor, tuple[int, ...]]:
        """A stash, the tensor itself, or a mask's (bits, shape)."""
        mode = self.mode
        if tensor.dtype is torch.bool and tensor.numel() >= mode.site.rules["fallback", "saved"].min_bytes:
            bits = bitmask.encode(tensor)
            mode.report.add(mode.site.name, self.name, "mask", "1 bit", bits.numel())
            return bits, tuple(tensor.shape)
        if not tensor.is_floating_point() or _is_weight(tensor):
            return tensor
        return mode.keep(tensor, "fallback", "saved", label=self.name)


class _Packed:
    """What the graph holds: tensors (or what an outer hook made of them) and how to get one tensor back."""

    __slots__ = ("shape", "spec", "tensors", "unwrap")

    def __init__(
        self,
        tensors: list[Any],
        spec: Spec | None,
        shape: tuple[int, ...] | None,
        unwrap: Callable[[Any], Tensor] | None,
    ) -> None:
        self.tensors, self.spec, self.shape, self.unwrap = tensors, spec, shape, unwrap


def _unpack(packed: _Packed) -> Tensor:
    tensors = packed.tensors if packed.unwrap is None else [packed.unwrap(t) for t in packed.tensors]
    if packed.spec is not None:
        return value(packed.spec, tensors)
    if packed.shape is not None:
        return bitmask.decode(tensors[0], packed.shape)
    return tensors[0]


def _is_weight(tensor: Tensor) -> bool:
    """A parameter, a view of one, or a cast of one (autocast's copies hang directly on the parameter)."""
    if tensor.is_leaf:
        return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
    node = tensor.grad_fn
    before = node.next_functions if node is not None else ()
    return bool(before) and all([b is not None and b.name() == "torch::autograd::AccumulateGrad" for b, _ in before])


def _both_tracked(args: Any) -> bool:
    return len([a for a in args if isinstance(a, Tensor) and a.requires_grad]) > 1
