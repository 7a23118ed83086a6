"""The fused attention kernels of a GPU: flash, memory-efficient, cuDNN.

Each saves the stashes of q, k, v and of the output, and the exact logsumexp. The projection behind
shares the output's stash. Each calls its own backward on the decoded tensors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Stash, uncompressed
from mesa_train.utils.attention_backend import cudnn_masked_score

from .base import Operator, derivative, distinct, sum_to
from .masks import additive

_aten = torch.ops.aten

# The heads and features of one token may share a group of codes. Two tokens may not.
WITHIN = (1, 3)

# Flash attention takes head dims that are multiples of this number.
_FLASH_WIDTH = 8
# The memory-efficient kernel takes masks whose strides are multiples of this number.
_BIAS_WIDTH = 8


class Call(NamedTuple):
    """One call of attention.

    Attributes:
        recorder: the recorder of the call.
        stashes: the stashes of q, k and v.
        cast: q, k, v and the mask as autocast casts them.
        inputs: q, k, v and the mask as the user passed them.
        dropout_p: dropout probability of the weights.
        causal: whether the mask is causal.
        scale: the factor of the scores; None for PyTorch's default.
    """

    recorder: Recorder
    stashes: tuple[Stash, Stash, Stash]
    cast: tuple[Tensor, Tensor, Tensor, Tensor | None]
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    dropout_p: float
    causal: bool
    scale: float | None


class FlashCUDA(Operator):
    """Flash attention on a GPU.

    inputs: q, k, v.
    stashes: q, k, v, out, logsumexp, seed, offset.
    static: the sequence lengths, dropout, causal, scale.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        cum_q, cum_k, max_q, max_k, dropout_p, causal, scale = static
        width = grad.shape[-1]
        grad, *operands = [
            pad_last(t, _FLASH_WIDTH) for t in (grad, *[saved.get(i, grad.dtype) for i in range(4)])
        ]
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            *(
                grad,
                *operands,
                saved[4],
                cum_q,
                cum_k,
                max_q,
                max_k,
                dropout_p,
                causal,
                saved[5],
                saved[6],
            ),
            scale=scale,
        )
        return tuple([g[..., :width] for g in gradients])


class Efficient(Operator):
    """Memory-efficient attention on a GPU.

    inputs: q, k, v, mask.
    stashes: q, k, v, out, logsumexp, seed, offset, mask.
    static: dropout, causal, scale, shape of the user's mask.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dropout_p, causal, scale, mask_shape = static
        operands = [saved.get(i, grad.dtype) for i in range(3)]
        mask = saved[7] if saved.specs[7] is not None else None
        *gradients, dmask = _aten._scaled_dot_product_efficient_attention_backward(
            *(
                grad,
                *operands,
                mask,
                saved.get(3, grad.dtype),
                saved[4],
                saved[5],
                saved[6],
                dropout_p,
                list(needs),
            ),
            causal,
            scale=scale,
        )
        return *gradients, sum_to(dmask, mask_shape) if needs[3] else None


class CuDNN(Operator):
    """cuDNN's attention.

    inputs: q, k, v.
    stashes: q, k, v, out, logsumexp, seed, offset, mask.
    static: the sequence lengths, dropout, causal, scale.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        cum_q, cum_k, max_q, max_k, dropout_p, causal, scale = static
        operands = [saved.get(i, grad.dtype) for i in range(4)]
        mask = saved[7] if saved.specs[7] is not None else None
        return _aten._scaled_dot_product_cudnn_attention_backward(
            *(
                grad,
                *operands,
                saved[4],
                saved[5],
                saved[6],
                mask,
                cum_q,
                cum_k,
                max_q,
                max_k,
                dropout_p,
                causal,
            ),
            scale=scale,
        )


def flash(call: Call) -> Any:
    """Record flash attention, which takes no mask.

    As in PyTorch, head dims that are no multiple of 8 are padded with zeros.
    """
    recorder, operands = call.recorder, call.cast[:3]
    width = operands[0].shape[-1]
    scale = width**-0.5 if call.scale is None else call.scale
    with torch.no_grad():
        q, k, v = [pad_last(t, _FLASH_WIDTH) for t in operands]
    result, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = recorder.exactly(
        _aten._scaled_dot_product_flash_attention,
        *(q, k, v, call.dropout_p, call.causal, False),
        scale=scale,
    )
    result = result[..., :width]
    out = recorder.keep(result, "attention", "out", WITHIN)
    kept = (*call.stashes, out, uncompressed(logsumexp), uncompressed(seed), uncompressed(offset))
    static = (cum_q, cum_k, max_q, max_k, call.dropout_p, call.causal, scale)
    return recorded(recorder, FlashCUDA, result, out, kept, static, call.inputs[:3])


def efficient(call: Call) -> Any:
    """Record memory-efficient attention, which takes any mask."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
    with torch.no_grad():
        bias = mask
        if mask is not None and mask.dtype is torch.bool:
            bias = _numbers(recorder, mask, q.dtype)
        if bias is not None:
            if not aligned(bias):
                bias = pad_last(bias, _BIAS_WIDTH, always=True)[..., : bias.shape[-1]]
            bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    result, logsumexp, seed, offset = recorder.exactly(
        _aten._scaled_dot_product_efficient_attention,
        *(q, k, v, bias, True, call.dropout_p, call.causal),
        scale=call.scale,
    )
    out = recorder.keep(result, "attention", "out", WITHIN)
    statistics = (uncompressed(logsumexp), uncompressed(seed), uncompressed(offset))
    kept = (*call.stashes, out, *statistics, None if bias is None else uncompressed(bias))
    mask_shape = None if mask is None else tuple(mask.shape)
    static = (call.dropout_p, call.causal, call.scale, mask_shape)
    return recorded(recorder, Efficient, result, out, kept, static, call.inputs)


def cudnn(call: Call) -> Any:
    """Record cuDNN's attention, which takes any mask. The mask has no gradient."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
    if mask is not None and mask.dtype is torch.bool:
        mask = additive(mask, q.dtype, cudnn_masked_score())
    result, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = recorder.exactly(
        _aten._scaled_dot_product_cudnn_attention,
        *(q, k, v, mask, True, call.dropout_p, call.causal, False),
        scale=call.scale,
    )
    out = recorder.keep(result, "attention", "out", WITHIN)
    statistics = (uncompressed(logsumexp), uncompressed(seed), uncompressed(offset))
    kept = (*call.stashes, out, *statistics, None if mask is None else uncompressed(mask))
    static = (cum_q, cum_k, max_q, max_k, call.dropout_p, call.causal, call.scale)
    return recorded(recorder, CuDNN, result, out, kept, static, call.inputs[:3])


def _numbers(recorder: Recorder, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers, made once for all layers while the mask exists."""
    known = recorder.lineage.cast(mask, dtype)
    if known is None:
        known = uncompressed(additive(mask, dtype, -math.inf))
        recorder.lineage.set_cast(mask, dtype, known)
    return known.tensors[0]


def recorded(
    recorder: Recorder, node: Any, result: Tensor, out: Any, kept: Any, static: Any, inputs: Any
) -> Any:
    """Attach an operator to a result, and record the output's stash in the lineage."""
    output = node.apply(result, kept, static, *distinct(*inputs))
    recorder.lineage.set(output, out)
    return output


def aligned(mask: Tensor) -> bool:
    """True if the memory-efficient kernel reads the mask as it is.

    All strides but the last must be multiples of 8. PyTorch pads other masks, and so does
    `efficient`.
    """
    *strides, last = mask.stride()
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        # As in PyTorch: a stride that the tracer does not know is not aligned.
        if not all([has_static_value(n) for n in strides]):
            return False
    return all([n % _BIAS_WIDTH == 0 for n in strides]) and last == 1


def pad_last(tensor: Tensor, multiple: int, always: bool = False) -> Tensor:
    """Pad the last dim with zeros to a multiple.

    always: pad a size that is a multiple to the next one. The strides of the result are then
    multiples, whatever they were.
    """
    size = tensor.shape[-1]
    missing = multiple - size % multiple
    if missing == multiple and not always:
        return tensor
    return F.pad(tensor, (0, missing))
