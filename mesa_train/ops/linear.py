"""Linear, and a layer scale behind it.

Saves the input's stash: 1 byte per element at 8 bits. Behind a norm, an activation or attention it
shares their stash and saves nothing of its own. Also saves the weight itself. The backward casts
the weight again, so autocast's copy is not saved. A frozen weight saves no input. A frozen input
saves no weight.

y = scale * (x W^T + b), with a trained scale per output feature, needs no output either. With G =
g^T x: dW = scale * G and dscale = rowsum(W * G) + b * sum(g). So the Linear's output, which PyTorch
would save, is never saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train import kernels
from mesa_train.policy import MATMUL
from mesa_train.stash.backward_cache import backward_cache
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed

from .activation import Activated
from .base import Operator, derivative, distinct, kept_first
from .folding import folded


class Linear(Operator):
    """A Linear.

    inputs: x (..., in), weight (out, in), bias (out) or None.
    stashes: x, weight.
    """

    @derivative("linear")
    def backward(
        saved: Saved, static: None, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        return _gradients(saved, needs, grad)


class ScaledLinear(Operator):
    """A Linear with a layer scale behind it.

    inputs: x, weight, bias, scale (out).
    stashes: x, weight, scale, bias.
    static: the Linear's dtype.
    """

    @derivative("linear")
    def backward(
        saved: Saved, dtype: torch.dtype, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        weight, scale = saved[1], saved[2]
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = dscale = None
        scaled, narrow, total = _scaled_rows(rows, scale, dtype)
        if needs[0]:
            dx = (scaled @ _cast(weight, scaled)).view(*grad.shape[:-1], weight.shape[1])
        if needs[1] or needs[3]:
            x = _input(saved, dx, dtype)
            unscaled = (narrow.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            dweight = unscaled * scale[:, None]
            dscale = (weight * unscaled).sum(1)
            if saved.specs[3] is not None:
                dscale = dscale + saved[3] * total
        if needs[2]:
            dbias = scale * total
        return dx, dweight if needs[1] else None, dbias, dscale if needs[3] else None


class RecomputedLinear:
    """Recipe: the Linear again, from its input's stash."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        parameters = [p.to(spec.dtype) for p in saved.own(spec)]
        return F.linear(saved.value(spec.sources[0], spec.dtype), *parameters).to(dtype)


PRODUCT = RecomputedLinear()


def linear(
    recorder: Recorder, func: Any, /, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    """Row of torch.nn.functional.linear."""
    if (
        not recorder.covers("linear", input, weight, bias)
        or weight.dim() != 2
        or not weight.numel()
    ):
        return NotImplemented
    x = recorder.keep(input, "linear", "input") if weight.requires_grad else None
    kept = kept_first(
        recorder, x, recorder.weight(weight, viewed=True) if input.requires_grad else None
    )
    result = folded(recorder, func, input, weight, bias, transposed=True)
    output = Linear.apply(result, kept, None, *distinct(input, weight, bias))
    if x is not None:
        recorder.linears.set(output, (input, _version(input), x, weight, bias))
    if not recorder.context.rules.rebuilds_matmuls:
        return output
    # A frozen weight needs no input. But the output can be recomputed from the input's stash.
    source = recorder.known(input, "linear", "input") if x is None else x
    if source is None and input.requires_grad and weight.shape[1] <= weight.shape[0]:
        # The codes of the input take no more memory than those of the output. No operator saves
        # them if none saves the output.
        source = recorder.keep(input, "linear", "input")
    if source is not None and (source.cost < MATMUL or _narrow(weight)):
        parameters = recorder.parameters(weight, bias)
        recipe = Stash(PRODUCT, parameters, (source,), cost=MATMUL, dtype=result.dtype)
        recorder.lineage.set(output, recipe)
    return output


def _narrow(weight: Tensor) -> bool:
    """True if a Linear widens its input so much that the matmul in front is cheap to recompute too.

    An adapter of low rank does.
    """
    return 4 * weight.shape[1] <= weight.shape[0]


def scaled(recorder: Recorder, func: Any, /, product: Tensor, scale: Tensor) -> Any:
    """Row of a Linear's output times a trained scale per feature.

    NotImplemented for any other product.
    """
    made = recorder.linears.get(product)
    if (
        made is None
        or scale.dim() != 1
        or product.shape[-1] != scale.shape[0]
        or not scale.requires_grad
    ):
        return NotImplemented
    input, version, x, weight, bias = made
    if version != _version(input) or _watched(product):
        return NotImplemented
    w = recorder.weight(weight, viewed=True)
    b = None if bias is None else recorder.weight(bias, viewed=True)
    kept = kept_first(recorder, x, w, uncompressed(scale), b)
    result = recorder.exactly(func, product, scale)
    return ScaledLinear.apply(result, kept, product.dtype, input, weight, bias, scale)


def _scaled_rows(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """rows * scale and rows, both in `dtype`, and the sum of the rows."""
    if rows.dtype is torch.float64 or rows.dtype is dtype:
        return (rows * scale).to(dtype), rows.to(dtype), rows.sum(0)
    kernels.load()
    scaled, narrow, total = torch.ops.mesa_train.scale_backward.default(rows, scale, dtype)
    return scaled, narrow, total.to(rows.dtype)


def _cast(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the dtype of `like`, which depends on the gradient.

    Under torch.compile the cast must not run before the gradient exists (see `stash.Uncompressed`).
    """
    if torch.compiler.is_compiling() and weight.dtype is not like.dtype:
        return torch.ops.mesa_train.cast_like(weight, like)
    return weight.to(like.dtype)


def _version(tensor: Tensor) -> int:
    """A tensor's version; 0 if it has no version."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _watched(product: Tensor) -> bool:
    """True if the user needs the gradient of the Linear's output.

    A scaled Linear does not compute this gradient.
    """
    return not torch.compiler.is_compiling() and (
        product.retains_grad or bool(product._backward_hooks)
    )


def _input(saved: Saved, dx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The Linear's input. If it is an activation, its backward is computed in the same pass."""
    spec = saved.specs[0]
    assert spec is not None
    if dx is None or torch.compiler.is_compiling() or not isinstance(spec.recipe, Activated):
        return saved.get(0, dtype)
    return spec.recipe.load_for(saved, spec, dx)


def _gradients(saved: Saved, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
    """The gradients of a Linear's input, weight and bias."""
    dx = dweight = dbias = None
    # Flattened first. Otherwise a matmul with a permuted gradient would run batch by batch, and
    # copy the weight for each batch.
    flat = grad.reshape(-1, grad.shape[-1])
    if needs[0]:
        weight = saved.get(1, grad.dtype)
        dx = (flat @ weight).view(*grad.shape[:-1], weight.shape[1])
    if needs[1]:
        x = _input(saved, dx, grad.dtype)
        dweight = flat.t() @ x.reshape(-1, x.shape[-1])
    if needs[2]:
        known = None if torch.compiler.is_compiling() else backward_cache.take_sum(grad)
        dbias = flat.sum(0) if known is None else known
    return dx, dweight, dbias
