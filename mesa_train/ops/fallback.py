"""The generic fallback: saves tensors for functions without a row.

Most functions are left to PyTorch. Their saved tensors are reported as "uncompressed: exact".
Functions that tolerate codes are listed in `coded.py`. For these functions, a saved-tensor hook
does one of three things:

- It codes float tensors, never below 8 bits.
- It saves only the size if the backward reads only the size.
- It packs bools to bits, which is exact.

Parameters, autocast's weight copies, constants and small tensors pass unchanged. A tensor that has
a stash already shares it. If hooks are active already (offload, checkpointing, a byte counter), the
codes go through these hooks. The hooks then free, move or count codes.

Cost: one lookup for a call that is left to PyTorch; the hooks and the codes for a coded call.

torch does not pass some calls to a mode: calls of a custom `torch.autograd.Function`, of a
ScriptFunction, and of a C++ extension that is bound directly. They save the same tensors as in
plain PyTorch. An operator of `torch.library` reaches the fallback and is left to PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mesa_train.policy import VIEW
from mesa_train.stash.recipes import Replay
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, Uncompressed, strip, value
from mesa_train.utils.torch_functions import function_name

from .coded import CODED
from .masks import bits_of

# Functions that save nothing large. They are called without hooks, to save time.
NOTHING = frozenset(
    """
    add add_ sub sub_ rsub neg neg_ __get__ __set__ __setitem__ copy_ fill_ zero_
    requires_grad_ backward detach detach_ size dim ndim numel stride element_size data_ptr
    is_contiguous is_floating_point is_complex item tolist __len__ __hash__ __repr__
    __format__ __bool__ __iter__ nelement storage_offset untyped_storage get_device
    register_hook retain_grad eq ne lt le gt ge isnan isinf isfinite all any argmax argmin
    argsort zeros_like ones_like empty_like full_like rand_like randn_like new_zeros
    new_ones new_empty new_full new_tensor sum mean cat stack concat concatenate hstack
    vstack repeat tile cumsum type_as expand_as view_as reshape_as
    unfold fold meshgrid numpy cpu cuda type is_inference embedding
    """.split()
)

# Functions that save an operand only if the other operand needs a gradient.
_PRODUCTS = frozenset(["mul", "mul_", "multiply", "multiply_"])


def fallback(recorder: Recorder, func: Any, /, args: Any, kwargs: Any) -> Any:
    """Call `func` with the hooks active, unless the function saves nothing large."""
    if torch.compiler.is_compiling():
        if _writes(func, args, kwargs):
            recorder.lineage.clear()
            recorder.linears.clear()
        if getattr(func, "__name__", "") == "unflatten":
            # PyTorch 2.11 cannot trace the method under a mode.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)
    rules = recorder.context.rules
    if not rules.operators["fallback"] and not rules.functions:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name in NOTHING or not _tracked(args, kwargs):
        return func(*args, **kwargs)
    if name in _PRODUCTS and len([a for a in args if _needs_gradient(a)]) < 2:
        return func(*args, **kwargs)
    way = CODED.get(func)
    known = way is not None or (rules.functions and function_name(func) in rules.functions)
    looked_at = hasattr(recorder.hooks, "mesa_train_onlooker")
    if (
        not (known or looked_at)
        or isinstance(func, torch._ops.HigherOrderOperator)
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    ):
        return _left_alone(recorder, func, args, kwargs)
    hooks = _Hooks(recorder, func, args, kwargs)
    if hooks.operand is None and not (looked_at or hooks.masks):
        return _left_alone(recorder, func, args, kwargs)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, unpack):
        return func(*args, **kwargs)


def _left_alone(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` as PyTorch would, and report the tensors that its nodes save.

    If hooks are active, nothing is reported: to unpack a checkpoint's saved tensor would start a
    recompute.
    """
    if recorder.hooks is not None:
        return func(*args, **kwargs)
    start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    result = func(*args, **kwargs)
    todo = [
        r.grad_fn
        for r in (result if isinstance(result, (tuple, list)) else [result])
        if isinstance(r, Tensor) and r.grad_fn is not None
    ]
    seen, size = set(todo), 0
    while todo:
        node = todo.pop()
        for name in _saved_by(type(node)):
            saved = getattr(node, name)
            if isinstance(saved, Tensor) and not (saved.is_leaf and saved.requires_grad):
                size += _bytes(saved)
        # Only nodes that the call has made: no earlier node, and no node of a parameter.
        made = [n for n, _ in node.next_functions if n is not None and n not in seen]
        made = [n for n in made if start <= n._sequence_nr() < _LEAVES]
        seen.update(made)
        todo += made
    if size:
        recorder.report.add(
            recorder.context.name, function_name(func), "saved", "uncompressed: exact", size
        )
    return result


# The sequence number of every parameter's node.
_LEAVES = 2**64 - 1


@functools.cache
def _saved_by(kind: type) -> tuple[str, ...]:
    """The attributes of a node class that return its saved tensors."""
    return tuple([name for name in dir(kind) if name.startswith("_saved_")])


class _Hooks:
    """The pack hook of one call."""

    def __init__(self, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> None:
        self.recorder, self.name = recorder, function_name(func)
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        # The operand of "fallback" whose rule applies to float tensors. None: they stay
        # uncompressed.
        self.operand: str | None = None
        # The tensors that may be coded, None for all. `sizes`: whether only their sizes are saved.
        self.among: list[Tensor] | None = None
        self.sizes = False
        rules, coded = recorder.context.rules, CODED.get(func)
        # Whether the call has a mask that is worth packing. The rest of the call is left to
        # PyTorch.
        self.masks = coded is not None and coded.masks and any([self._is_mask(a) for a in args])
        if self.name in rules.functions:
            if not rules["fallback", self.name].enabled:
                return
            self.operand = self.name
        elif (
            coded is not None
            and not coded.masks
            and rules.operators["fallback"]
            and (coded.row is None or rules.operators[coded.row])
            and (coded.when is None or coded.when(args, kwargs))
        ):
            self.operand, self.among = "saved", coded.among(args, kwargs)
        self.sizes = coded is not None and coded.sizes

    def pack(self, tensor: Tensor) -> Packed:
        """The stash or the tensor, packed through the outer hooks."""
        kept = self._kept(tensor)
        tensors: list[Tensor] = []
        if isinstance(kept, Stash):
            spec = strip(kept, tensors, {}, {})
            return Packed.of(tensors, spec, self.outer)
        return Packed.of([kept], None, self.outer)

    def _kept(self, tensor: Tensor) -> Stash | Tensor:
        """A stash, or the tensor itself."""
        recorder, weight = self.recorder, _is_weight(tensor)
        if tensor.dtype is torch.bool and _plain(tensor):
            stash = self._mask(tensor)
            if stash is not None:
                return stash
        elif (
            self.operand is not None
            and tensor.requires_grad
            and tensor.is_floating_point()
            and _plain(tensor)
            and not weight
            and (self.among is None or any([_same(tensor, other) for other in self.among]))
        ):
            if self.sizes and tensor.device.type in ("cpu", "cuda"):
                recorder.report.add(recorder.context.name, self.name, "saved", "its size", 0)
                return Stash(_Size(tensor), (), cost=VIEW, dtype=tensor.dtype)
            return recorder.keep(tensor, "fallback", self.operand, label=self.name)
        if isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        known = recorder.lineage.get(tensor) if self.among is not None else None
        if known is not None and _bitwise(known):
            recorder.report.add(recorder.context.name, self.name, "saved", "rebuilt", 0, known)
            return known
        how = "exact"
        if self.operand is not None and tensor.is_floating_point() and self.among is None:
            how = "a parameter" if weight else "a constant"
        recorder.report.add(
            recorder.context.name, self.name, "saved", f"uncompressed: {how}", _bytes(tensor)
        )
        # Detached, because an output that its own node saves would form a cycle: the output holds
        # the node, and the node holds the output.
        return tensor.detach()

    def _is_mask(self, argument: Any) -> bool:
        """True if an argument is a mask that is smaller as bits."""
        if not isinstance(argument, Tensor) or argument.dtype is not torch.bool:
            return False
        size = argument.numel()
        least = self.recorder.context.rules["fallback", "saved"].min_bytes
        return size >= least and argument.untyped_storage().nbytes() > size // 8 + 1

    def _mask(self, mask: Tensor) -> Stash | None:
        """A mask's bits, made once while the mask exists; None if the mask itself is no larger."""
        recorder = self.recorder
        if not self._is_mask(mask):
            return None
        return bits_of(recorder, mask, self.name)


class _Size:
    """Recipe: a tensor of a given size, strides and device.

    The backward reads no elements, so all are NaN.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.strides, self.device = tensor.shape, tensor.stride(), tensor.device

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        last = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        elements = 1 + sum(last) if 0 not in self.shape else 0
        empty = torch.full((elements,), torch.nan, dtype=dtype, device=self.device)
        return empty.as_strided(self.shape, self.strides)


class Packed:
    """The object that the graph holds: saved tensors, and how to get one tensor back.

    Attributes:
        tensors: the tensors, or the objects that an outer hook made of them.
        spec: the structure of the stash that the tensors belong to; None for a single tensor.
        unwrap: the unpack function of the outer hooks; None without outer hooks.
        versions: the tensors' versions when they were packed; None with outer hooks.
    """

    __slots__ = ("spec", "tensors", "unwrap", "versions")

    def __init__(
        self,
        tensors: list[Any],
        spec: Spec | None,
        unwrap: Callable[[Any], Tensor] | None,
        versions: list[int] | None = None,
    ) -> None:
        self.tensors, self.spec, self.unwrap, self.versions = tensors, spec, unwrap, versions

    @classmethod
    def of(
        cls,
        tensors: list[Tensor],
        spec: Spec | None,
        outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None,
    ) -> Packed:
        """Pack a stash's tensors with its structure, or one tensor, through the outer hooks."""
        if outer is None:
            return cls(tensors, spec, None, [t._version for t in tensors])
        wrap, unwrap = outer
        return cls([wrap(t) for t in tensors], spec, unwrap)


def unpack(packed: Packed) -> Tensor:
    """The tensor that was packed."""
    # An uncompressed tensor may have been written to since. Under hooks, PyTorch leaves this check
    # to the hooks.
    if packed.versions is not None and packed.versions != [t._version for t in packed.tensors]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation"
        )
    tensors = (
        packed.tensors if packed.unwrap is None else [packed.unwrap(t) for t in packed.tensors]
    )
    return tensors[0] if packed.spec is None else value(packed.spec, tensors)


def _tracked(args: Any, kwargs: Any) -> bool:
    """True if an argument, or a tensor in a list of arguments, needs a gradient."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (list, tuple)):
            if any([_needs_gradient(a) for a in argument]):
                return True
        elif _needs_gradient(argument):
            return True
    return False


def _needs_gradient(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def _same(tensor: Tensor, other: Tensor) -> bool:
    """True if two tensors begin at the same place in memory."""
    if tensor.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    return bool(tensor.storage_offset() == other.storage_offset())


def _plain(tensor: Tensor) -> bool:
    """True if a tensor is one piece of memory: not sparse, nested or sharded."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    return type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor)


def _bitwise(stash: Stash) -> bool:
    """True if a stash rebuilds its tensor bit for bit, by the functions of the forward."""
    own = isinstance(stash.recipe, (Replay, Uncompressed)) or getattr(
        stash.recipe, "bitwise", False
    )
    return own and all([_bitwise(source) for source in stash.sources])


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; of the parts of a jagged tensor or another wrapper; else 0."""
    if _plain(tensor):
        return tensor.numel() * tensor.element_size()
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.values().nbytes if tensor.is_nested else 0


def _is_weight(tensor: Tensor) -> bool:
    """True if a tensor is a parameter, autocast's copy of a parameter, or a view of either."""
    base = tensor if tensor._base is None else tensor._base
    if base.is_leaf:
        return base.requires_grad or isinstance(base, torch.nn.Parameter)
    node = base.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and source.name() == "torch::autograd::AccumulateGrad"


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """True if a function may write to a tensor, and so to all tensors that share its memory."""
    if kwargs.get("inplace") or kwargs.get("out") is not None or any([a is True for a in args]):
        return True
    return _writes_by_name(func)


def _writes_by_name(func: Any) -> bool:
    """True if a function's name says that it writes in place."""
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.startswith("__"))


# Dynamo calls this function while tracing, and does not trace it: not every version of torch can
# trace the string methods used here. The mark is the one of torch.compiler.assume_constant_result,
# which would import all of torch._dynamo.
_writes_by_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
