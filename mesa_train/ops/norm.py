"""Layer norm and RMS norm.

Each saves the codes of its normalised input x_hat (1 byte per element) and the reciprocal standard
deviations. The mean is not needed. The output, x_hat * weight + bias, is rebuilt from the same
codes, so the Linear or convolution behind saves nothing. PyTorch saves the input (4 bytes per
element under autocast) and the output's cast (2 bytes).

If matmuls are recomputed (`recompute="linear"`), a layer or RMS norm of a matmul's output (queries
and keys) saves no codes. Its x_hat is computed from the recomputed output and the statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs.affine import Affine
from mesa_train.policy import CHEAP, MATMUL
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
from mesa_train.stash.tensors import held, narrowed

from .base import Operator, cast_like_autocast, derivative


class TokenNorm(Operator):
    """Layer norm or RMS norm.

    inputs: x, weight, bias.
    stashes: x_hat, rstd, weight.
    static: whether it is centred, the normalized shape.
    """

    @derivative("layer_norm")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        centred, shape = static
        rstd = saved[1]
        weight = saved[2].reshape(-1) if saved.specs[2] is not None else None
        spec = saved.specs[0]
        assert spec is not None
        leaf, cols = spec.recipe, math.prod(shape)
        flat = grad.reshape(-1, cols)
        if isinstance(leaf, Leaf) and isinstance(leaf.codec, Affine):
            codes, scales = saved.own(spec)
            dx, dweight, dbias = leaf.codec.norm_backward(
                (codes, scales), flat, rstd, weight, centred
            )
        else:
            x_hat = saved.value(spec, torch.promote_types(rstd.dtype, torch.float32))
            dx, dweight, dbias = token_norm_gradients(
                flat, x_hat.reshape(-1, cols), rstd, weight, centred
            )
        return (
            dx.view_as(grad) if needs[0] else None,
            dweight.view(shape) if needs[1] else None,
            dbias.view(shape) if needs[2] else None,
        )


class RMSNorm(TokenNorm):
    """`TokenNorm` under the name of RMS norm."""

    backward = derivative("rms_norm")(TokenNorm.backward.__wrapped__)


class Scaled:
    """Recipe: x_hat * weight + bias, the norm's output.

    `per_channel`: the shape that aligns weight with x_hat; None if the codec of the leaf x_hat
    applies weight and bias.
    """

    __slots__ = ("has_bias", "has_weight", "per_channel")

    def __init__(
        self, has_weight: bool, has_bias: bool, per_channel: tuple[int, ...] | None
    ) -> None:
        self.has_weight, self.has_bias, self.per_channel = has_weight, has_bias, per_channel

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        parameters = saved.own(spec)
        weight = parameters[0] if self.has_weight else None
        bias = parameters[-1] if self.has_bias else None
        source, asked, dtype = spec.sources[0], dtype, once(spec.dtype, dtype)
        if self.per_channel is None:
            leaf = source.recipe
            assert isinstance(leaf, Leaf)
            flat = [None if p is None else p.reshape(-1) for p in (weight, bias)]
            decoded = leaf.codec.decode(saved.own(source), leaf.layout.cols, dtype, *flat)
            return leaf.layout.restore(decoded).to(asked)
        value = saved.value(source, torch.promote_types(dtype, torch.float32))
        if weight is not None:
            value = value * weight.view(self.per_channel)
        if bias is not None:
            value = value + bias.view(self.per_channel)
        return value.to(dtype).to(asked)


class Normalized:
    """Recipe: x_hat of a layer or RMS norm over `dims` trailing dims.

    Computed from the norm's rebuilt input and the reciprocal deviations of the forward.
    """

    __slots__ = ("centred", "dims")

    def __init__(self, dims: int, centred: bool) -> None:
        self.dims, self.centred = dims, centred

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        # In the source's own dtype, which the source's other users share.
        value = saved.value(spec.sources[0])
        rstd = saved.own(spec)[0]
        rows = value.flatten(value.dim() - self.dims).to(torch.promote_types(dtype, rstd.dtype))
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * rstd.view(*rows.shape[:-1], 1)).view(value.shape).to(dtype)


def layer_norm(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    """Row of torch.nn.functional.layer_norm."""
    if not recorder.covers("layer_norm", input, weight, bias) or not input.numel():
        return NotImplemented
    shape = tuple(normalized_shape)
    x, *parameters = [cast_like_autocast(t) for t in (input, weight, bias)]
    codec = recorder.fused("layer_norm", "normalized", x.dtype)
    # PyTorch raises an error for other mixtures of dtypes.
    mixed = any([p is not None and p.dtype not in (x.dtype, torch.float32) for p in parameters])
    if codec is not None and not mixed and _rebuildable(recorder, "layer_norm", input) is None:
        return _fused(recorder, "layer_norm", codec, x, (input, weight, bias), shape, eps)
    result, mean, rstd = recorder.exactly(torch.native_layer_norm, x, shape, *parameters, eps)
    return _token_norm(recorder, "layer_norm", x, result, mean, rstd, (input, weight, bias), shape)


def rms_norm(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Row of torch.nn.functional.rms_norm."""
    if not recorder.covers("rms_norm", input, weight) or not input.numel():
        return NotImplemented
    shape = tuple(normalized_shape)
    # PyTorch computes at least in float32. Its default epsilon is the epsilon of that dtype.
    wide = torch.promote_types(input.dtype, torch.float32)
    least = torch.finfo(wide).eps if eps is None else eps
    codec = recorder.fused("rms_norm", "normalized", wide)
    if codec is not None and _rebuildable(recorder, "rms_norm", input) is None:
        x, scale = cast_like_autocast(input), cast_like_autocast(weight)
        if scale is None or scale.dtype is x.dtype:
            return _fused(recorder, "rms_norm", codec, x, (input, weight, None), shape, least)
    result = recorder.exactly(func, input, list(shape), weight, eps)
    with torch.no_grad():
        rows = input.to(wide).flatten(-len(shape))
        rstd = (rows.square().mean(-1) + least).rsqrt()
    return _token_norm(
        recorder, "rms_norm", input, result, None, rstd, (input, weight, None), shape
    )


def token_norm_gradients(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of a norm over rows.

    Args:
        grad: (rows, cols).
        x_hat: the normalised input, (rows, cols).
        rstd: (rows,).
        weight: (cols,) or None.
        centred: True for LayerNorm, False for RMSNorm.
    Returns:
        dx (rows, cols), dweight (cols,), dbias (cols,).
    """
    g = grad.to(x_hat.dtype)
    dweight, dbias = (g * x_hat).sum(0), g.sum(0)
    if weight is not None:
        g = g * weight
    inner = g - x_hat * (g * x_hat).mean(1, keepdim=True)
    if centred:
        inner = inner - g.mean(1, keepdim=True)
    return inner * rstd[:, None], dweight, dbias


def _token_norm(
    recorder: Recorder,
    operator: str,
    x: Tensor,
    result: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    shape: tuple[int, ...],
) -> Any:
    """Save x_hat of a computed norm, and record the norm."""
    centred, rstd = mean is not None, rstd.reshape(-1)
    source = _rebuildable(recorder, operator, inputs[0])
    if source is not None:
        recipe = Normalized(len(shape), centred)
        x_hat = Stash(recipe, (rstd,), (source,), cost=CHEAP, dtype=result.dtype)
        recorder.report.add(recorder.context.name, operator, "normalized", "rebuilt", 0)
    elif keeps_input(recorder, operator, inputs[0], rstd.dtype):
        kept = recorder.keep(inputs[0], operator, "normalized")
        recipe = Normalized(len(shape), centred)
        x_hat = Stash(recipe, (rstd,), (kept,), cost=CHEAP, dtype=result.dtype)
    else:
        codec = recorder.codec(operator, "normalized")
        with torch.no_grad():
            matrix = x.detach().reshape(-1, math.prod(shape))
            centre = None if mean is None else mean.reshape(-1)
            codes = codec.encode_normalized(matrix, centre, rstd)
        x_hat = _leaf(recorder, operator, codec, codes, result, shape)
    return _recorded(recorder, x_hat, result, rstd, inputs, shape, centred)


def _fused(
    recorder: Recorder,
    operator: str,
    codec: Affine,
    x: Tensor,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    shape: tuple[int, ...],
    eps: float,
) -> Any:
    """The norm and its codes in one pass."""
    _, weight, bias = inputs
    centred = operator == "layer_norm"
    with torch.no_grad():
        matrix = x.detach().reshape(-1, math.prod(shape))
        scale = None if weight is None else weight.reshape(-1)
        shift = None if bias is None else bias.reshape(-1)
        result, rstd, codes = codec.norm(matrix, scale, shift, eps, centred, x.dtype)
    result = result.view(x.shape)
    x_hat = _leaf(recorder, operator, codec, codes, result, shape)
    return _recorded(recorder, x_hat, result, rstd, inputs, shape, centred)


def keeps_input(recorder: Recorder, operator: str, input: Tensor, dtype: torch.dtype) -> bool:
    """True if a norm saves its input, as PyTorch does, because x_hat would take more memory.

    This is the case if the input is a parameter (weight standardization), or if x_hat is not coded.
    An uncompressed x_hat may have a wider dtype (`dtype`), and another operator may save the input
    too.
    """
    base = None if torch.compiler.is_compiling() else input._base
    if isinstance(input, torch.nn.Parameter) or isinstance(base, torch.nn.Parameter):
        return True
    if not recorder.lossless(operator, "normalized"):
        return False
    return input.dtype.itemsize < dtype.itemsize or not (
        torch.compiler.is_compiling() or narrowed(input)
    )


def _rebuildable(recorder: Recorder, operator: str, input: Tensor) -> Stash | None:
    """The stash of a norm's input if a matmul rebuilds it and the policy allows that, else None."""
    source = recorder.lineage.get(input)
    rebuilt = recorder.context.rules[operator, "normalized"].rebuild_linear
    return source if source is not None and source.cost == MATMUL and rebuilt else None


def _leaf(
    recorder: Recorder,
    operator: str,
    codec: Any,
    codes: tuple[Tensor, ...],
    result: Tensor,
    shape: tuple[int, ...],
) -> Stash:
    """A leaf of x_hat."""
    dims = tuple(range(result.dim()))
    layout = MatrixLayout(tuple(result.shape), dims, math.prod(shape))
    return recorder.leaf(codec, codes, layout, result.dtype, operator, "normalized")


def _recorded(
    recorder: Recorder,
    x_hat: Stash,
    result: Tensor,
    rstd: Tensor,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    shape: tuple[int, ...],
    centred: bool,
) -> Any:
    """Attach the norm's operator, and record how the output is rebuilt."""
    _, weight, bias = inputs
    stashes = (x_hat, uncompressed(rstd), None if weight is None else uncompressed(weight))
    node = TokenNorm if centred else RMSNorm
    output = node.apply(result, stashes, (centred, shape), *inputs)
    parameters = tuple([held(p) for p in (weight, bias) if p is not None])
    recipe = Scaled(
        weight is not None, bias is not None, None if isinstance(x_hat.recipe, Leaf) else shape
    )
    recorder.lineage.set(
        output, Stash(recipe, parameters, (x_hat,), cost=CHEAP, dtype=result.dtype)
    )
    return output
