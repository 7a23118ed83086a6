"""The base of the operators: an autograd node for a result that PyTorch has computed already.

Why: the forward must be exact. So an operator defines only the derivative.

How: a row of the table computes its output with the function that was called, under `no_grad`. The
row then passes the output to `Operator.apply`, whose forward only saves stashes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs.placeholder import recomputes
from mesa_train.stash.recorder import Recorder, beneath
from mesa_train.stash.stash import Saved, Spec, Stash, save, strip
from mesa_train.stash.tensors import autocasts


class Packed:
    """Stashes that passed the saved-tensor hooks before the operator computed its output."""

    __slots__ = ("specs", "tensors", "unpack")

    def __init__(self, stashes: tuple[Stash | None, ...], pack: Any, unpack: Any) -> None:
        tensors: list[Tensor] = []
        slots: dict[Any, int] = {}
        known: dict[int, Spec] = {}
        self.specs = tuple(
            [None if s is None else strip(s, tensors, slots, known) for s in stashes]
        )
        self.unpack = unpack
        with torch.no_grad():
            self.tensors = [pack(t) for t in tensors]


# The second argument of `apply`: stashes that are still to be saved, or that are saved already.
Kept = tuple[Stash | None, ...] | Packed


def kept_first(recorder: Recorder, *stashes: Stash | None) -> Kept:
    """Stashes for `apply`, from a row that has not computed its output yet.

    A non-reentrant checkpoint ends its recompute when the last tensor is saved. So in a recompute,
    this function saves the stashes at once. If they are the last saved tensors, the row's
    computation is skipped.
    """
    if (
        recorder.hooks is None
        or torch.compiler.is_compiling()
        or not recomputes(beneath(recorder.hooks))
    ):
        return stashes
    return Packed(stashes, *torch._C._autograd._top_saved_tensors_default_hooks(False))


def put(ctx: Any, stashes: Kept, static: Any) -> None:
    """Save stashes on an autograd context."""
    ctx.static = static
    if isinstance(stashes, Packed):
        ctx.kept, ctx.packed = stashes.specs, stashes
    else:
        save(ctx, *stashes)


class Operator(torch.autograd.Function):
    """Base of the operators. `apply(output, stashes, static, *inputs)` returns the output.

    The backward of a subclass returns one gradient per input. The docstrings of the subclasses
    list:

    inputs: the differentiable inputs.
    stashes: the saved stashes.
    static: constants.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, stashes: Kept, static: Any, *inputs: Any) -> Tensor:
        put(ctx, stashes, static)
        # Under torch.compile, the output must not be a view. An output and a view of the output may
        # both leave the graph. AOTAutograd then makes the view again from the output, with all
        # views in between, and `detach` would cut the gradient of the view. Inductor removes the
        # copy.
        return output.clone() if torch.compiler.is_compiling() else output.detach()


def derivative(operator: str) -> Callable[[Callable[..., tuple[Any, ...]]], Any]:
    """Decorator: make an operator's backward of `gradients(saved, static, needs, grad)`.

    Codes are not differentiable. So a second derivative raises an error that names the operator and
    the remedy.

    Args:
        operator: the policy's name of the operator, for the error message.
    Returns:
        A decorator. The decorated function returns one gradient per input.
    """

    def wrap(gradients: Callable[..., tuple[Any, ...]]) -> Any:
        @functools.wraps(gradients)
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad[3:]
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return (
                    None,
                    None,
                    None,
                    *gradients(_saved(ctx, grad), ctx.static, needs, grad),
                )
            with torch.no_grad():
                results = gradients(_saved(ctx, grad), ctx.static, needs, grad)
            message = (
                f"mesa_train: a second derivative through {operator!r} was asked for, but it keeps "
                f"codes, which have none. Leave it to PyTorch with overrides={{{operator!r}: "
                "{'enabled': False}}, or unwrap the model."
            )
            # The error node also depends on the leaves and on the incoming gradient. Otherwise a
            # derivative with respect to one of these would skip the error:
            # `torch.autograd.functional.jvp` differentiates with respect to the incoming gradient.
            tracked = [r.detach().requires_grad_() for r in results if r is not None] + _leaves(ctx)
            tracked += [grad] if grad.requires_grad else []
            blocked = iter(
                _as_tuple(torch._C._functions.DelayedError(message, len(tracked))(*tracked))
            )
            return (None, None, None, *[None if r is None else next(blocked) for r in results])

        return staticmethod(backward)

    return wrap


def _saved(ctx: Any, grad: Tensor) -> Saved:
    """The saved stashes of an autograd context."""
    tensors = ctx.saved_tensors
    packed = None if torch.compiler.is_compiling() else getattr(ctx, "packed", None)
    if packed is not None:
        tensors = [packed.unpack(t) for t in packed.tensors]
    return Saved(tensors, ctx.kept, grad)


def distinct(*tensors: Any) -> tuple[Any, ...]:
    """An operator's inputs, each as a separate tensor object.

    Dynamo cannot trace an operator that gets the same tensor twice.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any([tensor is t for t in found])
        found.append(tensor.view_as(tensor) if again else tensor)
    return tuple(found)


def sum_to(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum a gradient over the dims that broadcasting added to `shape`."""
    return grad if grad.shape == torch.Size(shape) else grad.sum_to_size(shape)


def cast_like_autocast(tensor: Any) -> Any:
    """A half-precision tensor in float32 under CUDA's autocast, which computes norms in float32.

    The functions that the rows call are at a level that autocast does not reach.
    """
    if tensor is None or tensor.device.type == "cpu" or not autocasts(tensor.device.type):
        return tensor
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _leaves(node: Any) -> list[Tensor]:
    """The leaf tensors that a node of the graph leads to."""
    found, seen, todo = [], {node}, [node]
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
                if hasattr(following, "variable"):
                    found.append(following.variable)
    return found


def aliases(stash: Stash, tensor: Tensor) -> bool:
    """True if a stash reads the memory of a tensor. Lossless and small stashes do."""
    storage = tensor.untyped_storage()._cdata
    return any([t.untyped_storage()._cdata == storage for t in stash.tensors]) or any(
        [aliases(source, tensor) for source in stash.sources]
    )


def outdated(stash: Stash, tensor: Tensor) -> bool:
    """True if a write to `tensor` would change the stash.

    A traced tensor has no address. There each stash without codes may change.
    """
    return stash.exact() if torch.compiler.is_compiling() else aliases(stash, tensor)


def apart(stash: Stash, tensor: Tensor) -> Stash:
    """The stash, or a copy of it if it reads the memory of `tensor`, which is to be overwritten."""
    if not outdated(stash, tensor):
        return stash
    tensors = tuple([t.clone() for t in stash.tensors])
    sources = tuple([apart(source, tensor) for source in stash.sources])
    return Stash(stash.recipe, tensors, sources, cost=stash.cost, dtype=stash.dtype)


class InPlace:
    """Mixin: run a function that overwrites the input, instead of recording an output.

    inputs: x.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Any], stashes: Kept, static: Any, x: Tensor, *rest: Any
    ) -> Tensor:
        put(ctx, stashes, static)
        run(x)
        ctx.mark_dirty(x)
        return x


def writable(input: Tensor) -> bool:
    """True if an in-place variant can be recorded.

    False for a leaf or a view: PyTorch itself must rebase these.
    """
    return not torch.compiler.is_compiling() and not input.is_leaf and not input._is_view()


def written(recorder: Recorder, input: Tensor, output: Tensor) -> Tensor:
    """Write `output` to `input` by autograd's own copy."""
    if torch.compiler.is_compiling():
        recorder.lineage.clear()
        recorder.linears.clear()
    return input.copy_(output)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
