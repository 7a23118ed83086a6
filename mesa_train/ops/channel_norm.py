"""Group norm, batch norm and instance norm.

Like layer norm (`norm.py`), each saves the codes of its normalised input x_hat (1 byte per element)
and the reciprocal standard deviations. The output is rebuilt from the same codes.

If the input is rebuilt from codes already, x_hat gets no codes of its own. Examples are two norms of
one activation (DPN) and a norm of joined activations (DenseNet). x_hat is computed from the rebuilt
input and the statistics of the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import MatrixLayout, Saved, Spec, Stash, exact, uncompressed
from mesa_train.stash.tensors import held

from .base import Operator, cast_like_autocast, derivative
from .norm import Scaled, keeps_input


class ChannelNorm(Operator):
    """Group or batch norm.

    inputs: x (B, C, ...), weight, bias.
    stashes: x_hat, rstd, weight.
    static: the shape (B, groups, C / groups, positions), and the dims of this shape that the
    statistics average over. No dims means that the statistics were constants.
    """

    @derivative("batch_norm")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        shape, averaged = static
        rstd = saved[1]
        wide = torch.promote_types(grad.dtype, torch.float32)
        g = grad.reshape(shape).to(wide)
        x_hat = _centred(saved, wide, shape, averaged)
        dweight = (g * x_hat).sum((0, 3)).reshape(-1) if needs[1] else None
        dbias = g.sum((0, 3)).reshape(-1) if needs[2] else None
        dx = None
        if needs[0]:
            if saved.specs[2] is not None:
                g = g * saved[2].reshape(shape[1], shape[2], 1)
            if averaged:
                g = (
                    g
                    - g.mean(averaged, keepdim=True)
                    - x_hat * (g * x_hat).mean(averaged, keepdim=True)
                )
            dx = (g * rstd).reshape(grad.shape)
        return dx, dweight, dbias


def _centred(
    saved: Saved, dtype: torch.dtype, shape: tuple[int, ...], averaged: tuple[int, ...]
) -> Tensor:
    """x_hat, with a mean of 0 over the averaged dims, as x_hat had before it was coded.

    The mean of the codes' errors is small. But the backward multiplies this mean by the gradient's
    sum over a channel, in which the errors of single elements cancel.
    """
    spec = saved.specs[0]
    assert spec is not None
    x_hat = saved.value(spec, dtype).reshape(shape)
    if averaged and not exact(spec):
        # Decoded or computed only for this backward, so this function may write to it.
        x_hat.sub_(x_hat.mean(averaged, keepdim=True))
    return x_hat


class ChannelNormalized:
    """Recipe: x_hat from the norm's input and the statistics of the forward.

    The input is viewed in the shape (B, groups, C / groups, positions).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        value, (mean, rstd) = saved.value(spec.sources[0]), saved.own(spec)
        rows = value.reshape(self.shape).to(torch.promote_types(dtype, rstd.dtype))
        return ((rows - mean) * rstd).reshape(value.shape).to(dtype)


class GroupNorm(ChannelNorm):
    """`ChannelNorm` under the name of group norm."""

    backward = derivative("group_norm")(ChannelNorm.backward.__wrapped__)


class InstanceNorm(ChannelNorm):
    """`ChannelNorm` under the name of instance norm."""

    backward = derivative("instance_norm")(ChannelNorm.backward.__wrapped__)


_NODES = {"batch_norm": ChannelNorm, "group_norm": GroupNorm, "instance_norm": InstanceNorm}


def group_norm(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Row of torch.nn.functional.group_norm."""
    if (
        not recorder.covers("group_norm", input, weight, bias)
        or not input.numel()
        or input.shape[1] % num_groups
    ):
        return NotImplemented
    batch, channels = input.shape[:2]
    positions = input.numel() // (batch * channels)
    x, *parameters = [cast_like_autocast(t) for t in (input, weight, bias)]
    # As PyTorch does before it calls this function.
    memory_format = suggest_memory_format(x) if x.device.type == "cpu" else torch.contiguous_format
    result, mean, rstd = recorder.exactly(
        torch.native_group_norm,
        x.contiguous(memory_format=memory_format),
        *parameters,
        batch,
        channels,
        positions,
        num_groups,
        eps,
    )
    shape = (batch, num_groups, channels // num_groups, positions)
    statistics = mean.view(batch, num_groups, 1, 1), rstd.view(batch, num_groups, 1, 1)
    return _channel_norm(
        recorder, "group_norm", x, result, statistics, (input, weight, bias), shape, (2, 3)
    )


def batch_norm(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Row of torch.nn.functional.batch_norm.

    Updates the running statistics exactly as PyTorch does.
    """
    channels = input.shape[1] if input.dim() >= 2 else 0
    if not recorder.covers("batch_norm", input, weight, bias) or not input.numel() or not channels:
        return NotImplemented
    if training and input.numel() == channels:
        return NotImplemented  # PyTorch's own error describes the problem
    result, mean, rstd, *_ = recorder.exactly(
        torch._batch_norm_impl_index,
        *(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            torch.backends.cudnn.enabled,
        ),
    )
    if not training:
        assert running_mean is not None
        assert running_var is not None
        # At least in float32, as PyTorch's own backward computes it from the running variance.
        wide = torch.promote_types(running_var.dtype, torch.float32)
        mean, rstd = running_mean.clone(), (running_var.to(wide) + eps).rsqrt()
    batch = input.shape[0]
    shape = (batch, 1, channels, input.numel() // (batch * channels))
    statistics = mean.view(1, 1, channels, 1), rstd.view(1, 1, channels, 1)
    averaged = (0, 3) if training else ()
    return _channel_norm(
        recorder, "batch_norm", input, result, statistics, (input, weight, bias), shape, averaged
    )


def instance_norm(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Row of torch.nn.functional.instance_norm without running statistics.

    It is a group norm with one group per channel.
    """
    if (
        running_mean is not None
        or running_var is not None
        or not use_input_stats
        or not recorder.covers("instance_norm", input, weight, bias)
        or input.dim() < 3
        or not input.numel()
        or input[0, 0].numel() == 1
    ):
        return NotImplemented
    batch, channels = input.shape[:2]
    # As PyTorch computes it: a batch norm over one image with a channel for each channel of the
    # batch.
    repeated = [None if p is None else p.detach().repeat(batch) for p in (weight, bias)]
    result, mean, rstd, *_ = recorder.exactly(
        torch._batch_norm_impl_index,
        input.detach().contiguous().view(1, batch * channels, *input.shape[2:]),
        *(*repeated, None, None, True, momentum, eps, torch.backends.cudnn.enabled),
    )
    shape = (batch, channels, 1, input.numel() // (batch * channels))
    statistics = mean.view(batch, channels, 1, 1), rstd.view(batch, channels, 1, 1)
    inputs = (input, weight, bias)
    result = result.view(input.shape)
    return _channel_norm(
        recorder, "instance_norm", input, result, statistics, inputs, shape, (2, 3)
    )


def _channel_norm(
    recorder: Recorder,
    operator: str,
    x: Tensor,
    result: Tensor,
    statistics: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    shape: tuple[int, ...],
    averaged: tuple[int, ...],
) -> Any:
    """Save x_hat, or the input, of a computed norm, and record the norm."""
    _, weight, bias = inputs
    mean, rstd = statistics
    if _rebuilt(recorder, operator, inputs[0]) or keeps_input(
        recorder, operator, inputs[0], rstd.dtype
    ):
        kept = recorder.keep(inputs[0], operator, "normalized")
        recipe = ChannelNormalized(shape)
        x_hat = Stash(recipe, (mean, rstd), (kept,), cost=CHEAP, dtype=result.dtype)
    else:
        x_hat = _coded(recorder, operator, x, result.dtype, statistics, shape)
    stashes = (x_hat, uncompressed(rstd), None if weight is None else uncompressed(weight))
    output = _NODES[operator].apply(result, stashes, (shape, averaged), *inputs)
    parameters = tuple([held(p) for p in (weight, bias) if p is not None])
    scaled = Scaled(weight is not None, bias is not None, (-1, *[1] * (x.dim() - 2)))
    recorder.lineage.set(
        output, Stash(scaled, parameters, (x_hat,), cost=CHEAP, dtype=result.dtype)
    )
    return output


def _rebuilt(recorder: Recorder, operator: str, input: Tensor) -> bool:
    """True if a norm's input is rebuilt from codes without a matmul."""
    known = recorder.known(input, operator, "normalized")
    return known is not None and known.cost < MATMUL and not exact(known)


def _coded(
    recorder: Recorder,
    operator: str,
    x: Tensor,
    dtype: torch.dtype,
    statistics: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
) -> Stash:
    """A leaf of x_hat."""
    mean, rstd = statistics
    codec = recorder.codec(operator, "normalized")
    with torch.no_grad():
        if x.is_contiguous() and shape[3] > 1:
            layout = MatrixLayout(tuple(x.shape), tuple(range(x.dim())), shape[3])
            rows = [s.expand(*shape[:3], 1).reshape(-1) for s in (mean, rstd)]
            tensors = codec.encode_normalized(x.detach().reshape(-1, shape[3]), *rows)
        else:
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            aligned = [s.expand(*s.shape[:2], shape[2], 1).flatten(1, 2) for s in (mean, rstd)]
            aligned = [s.view(s.shape[0], -1, *[1] * (x.dim() - 2)) for s in aligned]
            # With one position per channel, groups run along the channels.
            within = tuple(range(2 if shape[3] > 1 else 1, x.dim()))
            layout, matrix = MatrixLayout.of((wide - aligned[0]) * aligned[1], within)
            tensors = codec.encode(matrix)
    return recorder.leaf(codec, tensors, layout, dtype, operator, "normalized")
