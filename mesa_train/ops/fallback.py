"""The generic fallback: whatever PyTorch saves for an operator without a row is coded on its way
into the graph.

A saved-tensor hook codes float tensors (never below 8 bits) and packs bools to bits; parameters,
autocast's weight copies and small tensors pass. A tensor whose stash is known shares it. If
somebody else's hooks are active (offload, checkpointing, a byte counter), the codes go through
them, so that they free, move or count codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.stash import Spec, Stash, strip, value

if TYPE_CHECKING:
    from mesa_train.intercept import Interception

# Functions that save nothing of size.
_NOTHING = frozenset(
    """
    add add_ sub sub_ rsub neg neg_ __get__ __set__ __setitem__ copy_ fill_ zero_
    requires_grad_ backward detach detach_ size dim ndim numel stride element_size data_ptr
    is_contiguous is_floating_point is_complex item tolist __len__ __hash__ __repr__
    __format__ __bool__ __iter__ nelement storage_offset untyped_storage get_device
    register_hook retain_grad eq ne lt le gt ge isnan isinf isfinite all any argmax argmin
    argsort zeros_like ones_like empty_like full_like rand_like randn_like new_zeros
    new_ones new_empty new_full new_tensor sum mean cat stack concat concatenate hstack
    vstack repeat tile masked_fill masked_fill_ cumsum type_as expand_as view_as reshape_as
    interpolate upsample unfold fold meshgrid numpy cpu cuda type is_inference embedding
    """.split()
)

# Functions whose saved tensors must stay exact: a loss seeds the whole backward; a derivative that
# compares what was saved with a bound or with another tensor, or that has a pole, turns a small
# error into any error.
_EXACT = frozenset(
    """
    log_softmax cross_entropy nll_loss nll_loss_nd binary_cross_entropy
    binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss huber_loss kl_div
    soft_margin_loss multi_margin_loss ctc_loss gaussian_nll_loss cosine_embedding_loss
    triplet_margin_loss hinge_embedding_loss poisson_nll_loss margin_ranking_loss logsumexp
    multilabel_margin_loss multilabel_soft_margin_loss amax amin max min maximum minimum
    fmax fmin aminmax clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip clip_ abs
    abs_ absolute threshold threshold_ hardshrink softshrink prelu rrelu hardtanh hardtanh_
    floor_divide remainder fmod heaviside nan_to_num nan_to_num_ logical_and logical_or
    reciprocal reciprocal_ rsqrt rsqrt_ sqrt sqrt_ log log_ log2 log10 log1p log1p_ logit
    xlogy acos asin acosh atanh tan atan2 norm vector_norm matrix_norm renorm cdist pdist
    dist prod cumprod logcumsumexp erfinv lgamma digamma
    """.split()
)

# Functions that keep something only if both operands need a gradient, and then the second must stay
# exact or not.
_PRODUCTS = frozenset(["mul", "mul_", "multiply"])
_QUOTIENTS = frozenset(["div", "div_", "divide", "true_divide", "__truediv__", "__rtruediv__"])


def fallback(mode: Interception, func: Any, /, args: Any, kwargs: Any) -> Any:
    """Call `func` with the coding hooks on, unless it saves nothing worth it."""
    if torch.compiler.is_compiling():
        if _writes(func, args, kwargs):
            mode.lineage.clear()
            mode.linears.clear()
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name in _NOTHING or name in _EXACT or not mode.site.rules.operators["fallback"]:
        return func(*args, **kwargs)
    if (name in _PRODUCTS or name in _QUOTIENTS) and not _both_tracked(args):
        return func(*args, **kwargs)
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return func(*args, **kwargs)
    exact = args[1] if name in _QUOTIENTS or name == "pow" else None
    hooks = _Hooks(mode, name, exact if isinstance(exact, Tensor) else None)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, unpack):
        return func(*args, **kwargs)


class _Hooks:
    """The pack hook of one call; the tensor `exact` is left as it is."""

    def __init__(self, mode: Interception, name: str, exact: Tensor | None) -> None:
        self.mode, self.name, self.exact = mode, name, exact
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(self, tensor: Tensor) -> Packed:
        with torch.no_grad():
            kept = self._kept(tensor)
        tensors: list[Tensor] = []
        specs: dict[int, Spec] = {}
        spec = shape = None
        if isinstance(kept, Stash):
            spec = strip(kept, tensors, {}, specs)
        elif isinstance(kept, tuple):
            tensors, shape = [kept[0]], kept[1]
        else:
            tensors = [kept]
        return Packed.of(tensors, spec, shape, self.outer)

    def _kept(self, tensor: Tensor) -> Stash | Tensor | tuple[Tensor, tuple[int, ...]]:
        """A stash, the tensor itself, or a mask's (bits, shape)."""
        mode = self.mode
        if (
            tensor.dtype is torch.bool
            and tensor.numel() >= mode.site.rules["fallback", "saved"].min_bytes
        ):
            bits = mode.bits(tensor)
            mode.report.add(mode.site.name, self.name, "mask", "1 bit", bits.numel())
            return bits, tuple(tensor.shape)
        if self.exact is not None and tensor.data_ptr() == self.exact.data_ptr():
            return tensor
        if (
            not tensor.is_floating_point()
            or tensor.layout is not torch.strided
            or _is_weight(tensor)
        ):
            return tensor
        return mode.keep(tensor, "fallback", "saved", label=self.name)


class Packed:
    """What the graph holds: tensors (or what an outer hook made of them) and how to get one tensor
    back."""

    __slots__ = ("shape", "spec", "tensors", "unwrap", "versions")

    def __init__(
        self,
        tensors: list[Any],
        spec: Spec | None,
        shape: tuple[int, ...] | None,
        unwrap: Callable[[Any], Tensor] | None,
        versions: list[int] | None = None,
    ) -> None:
        self.tensors, self.spec, self.shape, self.unwrap, self.versions = (
            tensors,
            spec,
            shape,
            unwrap,
            versions,
        )

    @classmethod
    def of(
        cls,
        tensors: list[Tensor],
        spec: Spec | None,
        shape: tuple[int, ...] | None,
        outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None,
    ) -> Packed:
        """A stash's tensors with its structure, a mask's bits with its shape, or one tensor alone,
        through the hooks that were on before ours."""
        if outer is None:
            return cls(tensors, spec, shape, None, [t._version for t in tensors])
        wrap, unwrap = outer
        return cls([wrap(t) for t in tensors], spec, shape, unwrap)


def unpack(packed: Packed) -> Tensor:
    """The tensor that was packed."""
    # What is kept whole may have been written to since; under hooks PyTorch leaves that check to
    # them.
    if packed.versions is not None and packed.versions != [t._version for t in packed.tensors]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation"
        )
    tensors = (
        packed.tensors if packed.unwrap is None else [packed.unwrap(t) for t in packed.tensors]
    )
    if packed.spec is not None:
        return value(packed.spec, tensors)
    if packed.shape is not None:
        return bitmask.decode(tensors[0], packed.shape)
    return tensors[0]


def _is_weight(tensor: Tensor) -> bool:
    """A parameter, a view of one, or a cast of one (autocast's copies hang directly on the
    parameter)."""
    if tensor.is_leaf:
        return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
    node = tensor.grad_fn
    before = node.next_functions if node is not None else ()
    return bool(before) and all(
        [b is not None and b.name() == "torch::autograd::AccumulateGrad" for b, _ in before]
    )


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function may write to a tensor, and so to all that share its memory."""
    if kwargs.get("inplace") or kwargs.get("out") is not None or any([a is True for a in args]):
        return True
    return _writes_by_name(func)


def _writes_by_name(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.startswith("__"))


# Answered while tracing instead of traced: not every version of torch can trace what is asked of a
# function's name. As torch.compiler.assume_constant_result, which would import all of torch._dynamo.
_writes_by_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _both_tracked(args: Any) -> bool:
    return len([a for a in args if isinstance(a, Tensor) and a.requires_grad]) > 1
