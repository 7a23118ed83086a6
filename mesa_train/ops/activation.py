"""Element-wise activations.

- gelu, silu and similar functions save the codes of their input (1 byte per element, nearest
  rounding). Their output is rebuilt from the same codes, so the Linear behind saves nothing.
- hardswish has a derivative that jumps at -3 and 3. It saves one bit per element in addition to the
  codes.
- sigmoid and tanh save the codes of their output. If the input has a stash, they save nothing.
- glu saves the codes of its input.

`stepped.py` has relu and similar functions, whose derivative has two values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.codecs.affine import Affine
from mesa_train.policy import CHEAP
from mesa_train.stash.backward_cache import backward_cache
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import (
    Leaf,
    MatrixLayout,
    Saved,
    Spec,
    Stash,
    once,
    uncompressed,
)

from .base import (
    InPlace,
    Operator,
    apart,
    cast_like_autocast,
    derivative,
    kept_first,
    writable,
    written,
)

_aten = torch.ops.aten

# kind: (the function, its derivative times a gradient), both at a decoded input. The fused kernels
# implement these kinds.
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, lambda g, x: _aten.gelu_backward(g, x)),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    ),
    "silu": (F.silu, _aten.silu_backward),
    "hardswish": (F.hardswish, _aten.hardswish_backward),
    "mish": (F.mish, _aten.mish_backward),
    "softplus": (F.softplus, lambda g, x: _aten.softplus_backward(g, x, 1, 20)),
    "elu": (F.elu, lambda g, x: _aten.elu_backward(g, 1, 1, 1, False, x)),
}

# kind: the derivative times a gradient, computed from the output.
OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}


# kind: bounds. Between the bounds the derivative is one smooth function of x; it is 0 below and 1 above. The
# derivative jumps at the bounds, and codes of x may fall on the other side of a bound.
BOUNDED = {"hardswish": (-3.0, 3.0)}


class Smooth(Operator):
    """An activation whose derivative is computed from its input.

    inputs: x. static: kind. stashes: x, and one bit per element for a kind in `BOUNDED` if x is coded: whether x
    lies between the bounds.
    """

    @derivative("activation")
    def backward(saved: Saved, kind: str, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
        spec = saved.specs[0]
        assert spec is not None
        if len(saved.specs) > 1:
            x = _on_its_side(saved.get(0, grad.dtype), saved[1], *BOUNDED[kind])
            return (SMOOTH[kind][1](grad, x),)
        leaf = spec.recipe
        if isinstance(leaf, Leaf) and isinstance(leaf.codec, Affine):
            layout, codes = leaf.layout, saved.own(spec)
            if not torch.compiler.is_compiling():
                handed = backward_cache.take_gradient(codes[0], grad)
                if handed is not None:
                    return (handed,)
            flat = grad.permute(layout.order).reshape(-1, layout.cols)
            return (layout.restore(leaf.codec.activation_backward(codes, flat, kind)),)
        return (SMOOTH[kind][1](grad, saved.get(0, grad.dtype)),)


def _on_its_side(x: Tensor, bits: Tensor, low: float, high: float) -> Tensor:
    """A decoded x, moved to the nearest value on the side of the bounds that the original x was on.

    `bits` are set between the bounds. An x on a bound counts as outside.
    """
    inside = bitmask.decode(bits, tuple(x.shape))
    shorter = 1 - torch.finfo(x.dtype).eps
    outside = torch.where(x > (low + high) / 2, x.clamp(min=high), x.clamp(max=low))
    return torch.where(inside, x.clamp(low * shorter, high * shorter), outside)


class FromOutput(Operator):
    """An activation whose derivative is computed from its output. inputs: x. stashes: the output. static: kind."""

    @derivative("activation")
    def backward(saved: Saved, kind: str, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
        return (OUTPUT[kind](grad, saved.get(0, grad.dtype)),)


class Gated(Operator):
    """A gated linear unit (glu). inputs: x. stashes: x. static: dim."""

    @derivative("activation")
    def backward(saved: Saved, dim: int, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
        return (_aten.glu_backward(grad, saved.get(0, grad.dtype), dim),)


class Activated:
    """Recipe: the activation of its source. From affine codes in one pass."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        source = spec.sources[0]
        leaf = source.recipe
        if isinstance(leaf, Leaf) and isinstance(leaf.codec, Affine):
            decoded = leaf.codec.activation_decode(
                saved.own(source), leaf.layout.cols, once(spec.dtype, dtype), self.kind
            )
            return leaf.layout.restore(decoded).to(dtype)
        # In the dtype of the forward, because autocast may have widened the source.
        return SMOOTH[self.kind][0](saved.value(source, spec.dtype)).to(dtype)

    def load_for(self, saved: Saved, spec: Spec, grad: Tensor) -> Tensor:
        """The activation in the dtype of `grad`, its gradient.

        The same pass over the codes also computes the result of the activation's own backward, which runs next. The
        backward cache stores this result.
        """
        source = spec.sources[0]
        leaf = source.recipe
        if (
            not (isinstance(leaf, Leaf) and isinstance(leaf.codec, Affine))
            or once(spec.dtype, grad.dtype) is not grad.dtype
            or self.kind in BOUNDED
        ):
            return saved.value(spec, grad.dtype)
        layout, codes = leaf.layout, saved.own(source)
        flat = grad.permute(layout.order).reshape(-1, layout.cols)
        if not _sums(layout, flat):
            dx, value = leaf.codec.activation_pair((codes[0], codes[1]), flat, self.kind)
            backward_cache.offer_gradient(codes[0], grad, layout.restore(dx))
            return layout.restore(value)
        dx, value, total = leaf.codec.activation_pair_sum((codes[0], codes[1]), flat, self.kind)
        before = layout.restore(dx)
        backward_cache.offer_gradient(codes[0], grad, before)
        backward_cache.offer_sum(before, total)
        return layout.restore(value)


def _sums(layout: MatrixLayout, grad: Tensor) -> bool:
    """True if the pass also sums the gradient over the rows, for the bias of the Linear in front.

    On a GPU this avoids a second read of the gradient. On a CPU the sum alone takes a fifth of the time of the
    pass.
    """
    last = len(layout.shape) - 1
    return (
        grad.device.type != "cpu"
        and grad.dtype.itemsize <= 4
        and layout.order[-1:] == (last,)
        and layout.cols == layout.shape[last]
    )


class SmoothInPlace(InPlace, Smooth):  # type: ignore[misc]
    """`Smooth` that writes to its input."""


def smooth(kind: str, overwrites: bool = False) -> Any:
    """Row of an activation that saves its input. `overwrites`: for functions with a trailing underscore."""

    def row(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        which = kind
        if kind == "gelu" and kwargs.get("approximate", "none") in ("none", "tanh"):
            which = "gelu_tanh" if kwargs.pop("approximate", "none") == "tanh" else kind
        if (kind == "elu" and kwargs.get("alpha") == 1) or (kind == "softplus" and args == (1, 20)):
            args = ()
            kwargs.pop("alpha", None)
        inplace = overwrites or bool(kwargs.pop("inplace", args[0] if args else False))
        if (
            args[1:]
            or kwargs
            or (args and not isinstance(args[0], bool))
            or not recorder.covers("activation", input)
        ):
            return NotImplemented
        function = SMOOTH[which][0]
        # CUDA's autocast computes only softplus in float32. The fused pass keeps the input's dtype.
        widens = which == "softplus" and cast_like_autocast(input) is not input
        codec = None if widens else recorder.fused("activation", "input", input.dtype, input)
        if codec is not None and not inplace and not recorder.known(input, "activation", "input"):
            return _fused(recorder, codec, which, input)
        x = recorder.keep(input, "activation", "input")
        if inplace:
            # The function overwrites the tensor, so the saved tensor must be a copy of the present
            # version.
            x = apart(x, input)
        kept = kept_first(recorder, x, *_side(recorder, which, x, input))
        if inplace and writable(input):
            output = SmoothInPlace.apply(lambda t: t.copy_(function(t)), kept, which, input)
        else:
            output = Smooth.apply(recorder.exactly(function, input), kept, which, input)
        if inplace and output is not input:
            output = written(recorder, input, output)
        recorder.lineage.set(
            output, Stash(Activated(which), (), (x,), cost=CHEAP, dtype=output.dtype)
        )
        return output

    return row


def _fused(recorder: Recorder, codec: Affine, kind: str, input: Tensor) -> Tensor:
    """The activation and its input's codes in one pass."""
    with torch.no_grad():
        layout, matrix = MatrixLayout.of(input.detach(), (input.dim() - 1,))
        result, codes = codec.activation(matrix, kind)
        result = layout.restore(result)
    x = recorder.leaf(codec, codes, layout, input.dtype, "activation", "input")
    recorder.lineage.set(input, x)
    output = Smooth.apply(result, (x, *_side(recorder, kind, x, input)), kind, input)
    recorder.lineage.set(output, Stash(Activated(kind), (), (x,), cost=CHEAP, dtype=result.dtype))
    return output


def _side(recorder: Recorder, kind: str, x: Stash, input: Tensor) -> tuple[Stash, ...]:
    """One bit per element, whether x lies between the bounds, for a kind in `BOUNDED` if x is not exact. Else
    ()."""
    if kind not in BOUNDED or x.exact():
        return ()
    low, high = BOUNDED[kind]
    with torch.no_grad():
        bits = recorder.bits((input > low) & (input < high))
    recorder.report.add(recorder.context.name, "activation", "input", "1 bit", bits.numel())
    return (uncompressed(bits),)


def from_output(kind: str) -> Any:
    """Row of an activation whose derivative is computed from its output."""

    def row(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not recorder.covers("activation", input):
            return NotImplemented
        result = recorder.exactly(func, input)
        y = _from_input(recorder, kind, input) or recorder.keep(result, "activation", "output")
        output = FromOutput.apply(result, (y,), kind, input)
        recorder.lineage.set(output, y)
        return output

    return row


def _from_input(recorder: Recorder, kind: str, input: Tensor) -> Stash | None:
    """The stash of a sigmoid or tanh if its input has a stash, else None.

    The input may also be a multiple of a tensor. This is QuickGELU, x * sigmoid(1.702 * x): the
    product behind saves x as well.
    """
    table = recorder.context.rules.table
    source = recorder.known(input, "activation", "output")
    multiple = None if source is not None else recorder.multiples.get(input)
    rebuilt = table["activation", "output"].rebuild_cheap and table["activation", "input"].enabled
    if multiple is not None and rebuilt:
        x, (version, number) = multiple[0](), multiple[1:]
        if x is not None and x._version == version:
            kept = recorder.keep(x, "activation", "input")
            recipe = Recompute(torch.mul, (number,), {})
            source = Stash(recipe, (), (kept,), cost=CHEAP, dtype=input.dtype)
    if source is None:
        return None
    recipe = Recompute(getattr(torch, kind), (), {})
    recorder.report.add(recorder.context.name, "activation", "output", "rebuilt", 0, source)
    return Stash(recipe, (), (source,), cost=CHEAP, dtype=input.dtype)


def glu(recorder: Recorder, func: Any, /, input: Tensor, dim: int = -1) -> Any:
    """Row of torch.nn.functional.glu."""
    if not recorder.covers("activation", input):
        return NotImplemented
    x = recorder.keep(input, "activation", "input")
    kept = kept_first(recorder, x)
    result = recorder.exactly(func, input, dim)
    output = Gated.apply(result, kept, dim, input)
    recorder.lineage.set(
        output, Stash(Recompute(F.glu, (dim,), {}), (), (x,), cost=CHEAP, dtype=result.dtype)
    )
    return output
