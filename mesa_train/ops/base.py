"""What the operators share: an autograd node that records a result PyTorch has computed already.

A row computes its output with the function that was called, under `no_grad`, and hands it to
`Operator.apply`, whose forward only keeps stashes. So the forward is exact by construction; the
derivative is all that an operator defines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mesa_train.stash import Saved, Stash, save


class Operator(torch.autograd.Function):
    """Base of the operators. `apply(output, stashes, static, *inputs)`: backward returns one
    gradient per input."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, stashes: tuple[Stash | None, ...], static: Any, *inputs: Any
    ) -> Tensor:
        save(ctx, *stashes)
        ctx.static = static
        return output.detach()


def derivative(operator: str) -> Callable[[Callable[..., tuple[Any, ...]]], Any]:
    """Turn `gradients(saved, static, needs, grad)`, one gradient per input, into an operator's
    backward.

    Codes are not differentiable, so a second derivative raises an error that names the operator and
    the remedy.
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
                    *gradients(Saved(ctx.saved_tensors, ctx.kept, grad), ctx.static, needs, grad),
                )
            with torch.no_grad():
                results = gradients(
                    Saved(ctx.saved_tensors, ctx.kept, grad), ctx.static, needs, grad
                )
            message = (
                f"mesa_train: a second derivative through {operator!r} was asked for, but it keeps "
                f"codes, which have none. Leave it to PyTorch with overrides={{{operator!r}: "
                "{'enabled': False}}, or unwrap the model."
            )
            # Through the leaves and the incoming gradient as well, or a search for one of them would pass
            # the error by: `torch.autograd.functional.jvp` differentiates by the latter.
            tracked = [r.detach().requires_grad_() for r in results if r is not None] + _leaves(ctx)
            tracked += [grad] if grad.requires_grad else []
            blocked = iter(
                _as_tuple(torch._C._functions.DelayedError(message, len(tracked))(*tracked))
            )
            return (None, None, None, *[None if r is None else next(blocked) for r in results])

        return staticmethod(backward)

    return wrap


def sum_to(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum a gradient over the dims that broadcasting added to `shape`."""
    return grad if grad.shape == torch.Size(shape) else grad.sum_to_size(shape)


def cast_like_autocast(tensor: Any) -> Any:
    """A half-precision tensor in float32 under CUDA's autocast, which computes norms in float32; the
    functions that the rows call are below its reach."""
    if (
        tensor is None
        or tensor.device.type == "cpu"
        or not torch.is_autocast_enabled(tensor.device.type)
    ):
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
    """Whether a stash holds the very memory of a tensor, as lossless and small ones do."""
    storage = tensor.untyped_storage()._cdata
    return any([t.untyped_storage()._cdata == storage for t in stash.tensors])


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
