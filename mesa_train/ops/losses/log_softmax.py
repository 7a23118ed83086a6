"""log_softmax, and the losses that multiply it by a constant target.

log_softmax saves codes of the probabilities (1 byte per element), or nothing if a matmul rebuilds
its input (`recompute="linear"`). PyTorch saves its output.

`(target * log_softmax(x)).sum()` is a cross entropy: DINO, iBOT, distillation. PyTorch saves the
target too. The row of the product saves codes of the target. The row of the sum, and kl_div, know
the whole derivative by x: target minus probabilities. So they save codes of this difference alone,
and neither the node of log_softmax nor the node of the product stays in the graph.

Cost: the codes of the node that leaves the graph are computed and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative
from mesa_train.ops.narrow.positions import TimesTable
from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder, why_uncompressed
from mesa_train.stash.stash import Saved, Stash
from mesa_train.stash.tensors import is_plain

from .derivative import REDUCTIONS, Loss, derived, rebuilt, rooted, wide


class LogSoftmax(Operator):
    """log_softmax.

    inputs: x.
    stashes: the probabilities.
    static: dim, the dtype of x.
    """

    @derivative("loss")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dim, dtype = static
        total = grad.sum(dim, keepdim=True)
        return ((grad - saved.get(0, grad.dtype) * total).to(dtype),)


class Anchor(torch.autograd.Function):
    """A tensor of the shape of x that takes no memory. Its gradient is the gradient of x.

    A node that computes the gradient of x from other tensors has it as its input. So x itself need
    not exist any more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def log_softmax(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    dim: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Row of torch.log_softmax, Tensor.log_softmax and torch.nn.functional.log_softmax."""
    if dim is None or not recorder.covers("loss", input) or not input.dim():
        return NotImplemented
    source = rebuilt(recorder, input)
    if source is None and recorder.lossless("loss", "input"):
        return NotImplemented
    result = recorder.exactly(func, input, dim, *args, **kwargs)
    if source is None:
        with torch.no_grad():
            stash = rooted(recorder, wide(result).exp(), label="log_softmax")
    else:
        recipe = Recompute(torch.softmax, (dim,), {"dtype": result.dtype})
        stash = derived(recorder, recipe, (source,), result.dtype, "log_softmax")
    output = LogSoftmax.apply(result, (stash,), (dim, input.dtype), input)
    if source is not None and source.cost == MATMUL:
        recipe = Recompute(torch.log_softmax, (dim,), {"dtype": result.dtype})
        known = Stash(recipe, (), (source,), cost=CHEAP, dtype=result.dtype)
        recorder.lineage.set(output, known)
    if not recorder.lossless("loss", "input") and not why_uncompressed(
        result, recorder.context.rules["loss", "input"]
    ):
        x = input if recorder.traced else Anchor.apply(input)
        recorder.log_softmaxes.set(output, (x, dim % input.dim(), input.dtype))
    return output


def weighted(
    recorder: Recorder, func: Any, tracked: Tensor, constant: Tensor, input: Tensor, other: Tensor
) -> Any:
    """The product of an output of log_softmax with a constant target; else NotImplemented.

    Args:
        recorder: the recorder of the call.
        func: the product.
        tracked: the factor that needs a gradient.
        constant: the other factor.
        input: the first argument of `func`.
        other: the second argument of `func`.
    """
    made = recorder.log_softmaxes.get(tracked)
    if made is None or not _target(tracked, constant):
        return NotImplemented
    if not recorder.covers("mul", tracked, constant):
        return NotImplemented
    stash = recorder.lineage.get(constant)
    if stash is None:
        stash = rooted(recorder, constant, label="mul")
        recorder.lineage.set(constant, stash)
    result = recorder.exactly(func, input, other)
    output = TimesTable.apply(result, (stash,), tuple(tracked.shape), tracked)
    if not recorder.traced:
        versions = tracked._version, constant._version
        recorder.weighted.set(output, (*made, tracked, constant, versions))
    return output


def _target(tracked: Tensor, constant: Tensor) -> bool:
    """True if a constant can be the target of a cross entropy."""
    return (
        isinstance(constant, Tensor)
        and not constant.requires_grad
        and not isinstance(constant, torch.nn.Parameter)
        and is_plain(constant)
        and constant.is_floating_point()
        and constant.shape == tracked.shape
    )


def sum(recorder: Recorder, func: Any, /, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Row of torch.sum and Tensor.sum, for the product of a target and an output of log_softmax."""
    made = recorder.weighted.get(input) if isinstance(input, Tensor) else None
    if made is None or not kwargs.keys() <= {"dim", "keepdim"} or len(args) > 2:
        return func(input, *args, **kwargs)
    dims, keepdim = _reduced(input, *args, **kwargs)
    x, dim, dtype, logarithms, target, versions = made
    if (
        dim not in dims
        or versions != (logarithms._version, target._version)
        or _watched(input)
        or _watched(logarithms)
    ):
        return func(input, *args, **kwargs)
    result = recorder.exactly(func, input, *args, **kwargs)
    stash = _difference(recorder, logarithms, target, dim, "log_softmax")
    lost = () if keepdim else tuple(sorted(dims))
    return Loss.apply(result, (stash,), (1.0, lost, dtype), x, None)


def _reduced(input: Tensor, dim: Any = None, keepdim: bool = False) -> tuple[tuple[int, ...], bool]:
    """The dims that a sum with these arguments reduces, and whether they stay as dims of size 1."""
    given = range(input.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    dims = [d % input.dim() for d in given]
    return tuple(dims or range(input.dim())), keepdim


def _watched(tensor: Tensor) -> bool:
    """True if the user needs the gradient of a tensor that leaves the graph."""
    return tensor.retains_grad or bool(tensor._backward_hooks)


def _difference(
    recorder: Recorder, logarithms: Tensor, target: Tensor, dim: int, label: str
) -> Stash:
    """The stash of the derivative of sum(target * log_softmax(x)) by x."""
    with torch.no_grad():
        target = wide(target)
        p = wide(logarithms.detach()).exp().mul_(target.sum(dim, keepdim=True))
        return rooted(recorder, torch.sub(target, p, out=p), label=label)


def kl_div(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """Row of torch.nn.functional.kl_div with a constant target."""
    if (
        size_average is not None
        or reduce is not None
        or reduction not in (*REDUCTIONS, "batchmean")
        or not recorder.covers("loss", input)
        or not _target(input, target)
        or not input.dim()
        or not input.numel()
        or recorder.lossless("loss", "input")
    ):
        return NotImplemented
    result = recorder.exactly(func, input, target, reduction=reduction, log_target=log_target)
    counted = {"mean": input.numel(), "batchmean": input.shape[0]}
    made = recorder.log_softmaxes.get(input) if reduction != "none" else None
    with torch.no_grad():
        goal = target.exp() if log_target else target
        if made is not None and not recorder.traced and not _watched(input):
            x, dim, dtype = made
            stash = _difference(recorder, input, goal, dim, "kl_div")
        else:
            x, dtype = input, input.dtype
            stash = rooted(recorder, wide(goal), label="kl_div")
    static = (-1 / counted.get(reduction, 1), (), dtype)
    return Loss.apply(result, (stash,), static, x, None)
