"""The fused attention kernels of a GPU: flash, memory-efficient, cuDNN.

Each saves the stashes of q, k, v and of the output, and the exact logsumexp. The projection behind
shares the output's stash. Each calls its own backward on the decoded tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Stash, uncompressed

from .base import Operator, derivative, distinct

_aten = torch.ops.aten

# The heads and features of one token may share a group of codes. Two tokens may not.
WITHIN = (1, 3)


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
        operands = [saved.get(i, grad.dtype) for i in range(4)]
        return _aten._scaled_dot_product_flash_attention_backward(
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


class Efficient(Operator):
    """Memory-efficient attention on a GPU.

    inputs: q, k, v, mask.
    stashes: q, k, v, out, logsumexp, seed, offset, mask.
    static: dropout, causal, scale.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dropout_p, causal, scale = static
        operands = [saved.get(i, grad.dtype) for i in range(3)]
        mask = saved[7] if saved.specs[7] is not None else None
        return _aten._scaled_dot_product_efficient_attention_backward(
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
    """Record flash attention, which takes no mask."""
    recorder, q, k, v = call.recorder, *call.cast[:3]
    result, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = recorder.exactly(
        _aten._scaled_dot_product_flash_attention,
        *(q, k, v, call.dropout_p, call.causal, False),
        scale=call.scale,
    )
    out = recorder.keep(result, "attention", "out", WITHIN)
    kept = (*call.stashes, out, uncompressed(logsumexp), uncompressed(seed), uncompressed(offset))
    static = (cum_q, cum_k, max_q, max_k, call.dropout_p, call.causal, call.scale)
    return recorded(recorder, FlashCUDA, result, out, kept, static, call.inputs[:3])


def efficient(call: Call) -> Any:
    """Record memory-efficient attention, which takes any mask."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
    mask = additive(mask, q.dtype)
    bias = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    result, logsumexp, seed, offset = recorder.exactly(
        _aten._scaled_dot_product_efficient_attention,
        *(q, k, v, bias, True, call.dropout_p, call.causal),
        scale=call.scale,
    )
    out = recorder.keep(result, "attention", "out", WITHIN)
    statistics = (uncompressed(logsumexp), uncompressed(seed), uncompressed(offset))
    kept = (*call.stashes, out, *statistics, None if bias is None else uncompressed(bias))
    static = (call.dropout_p, call.causal, call.scale)
    return recorded(recorder, Efficient, result, out, kept, static, call.inputs)


def cudnn(call: Call) -> Any:
    """Record cuDNN's attention, which takes no mask or an additive mask."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
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


def recorded(
    recorder: Recorder, node: Any, result: Tensor, out: Any, kept: Any, static: Any, inputs: Any
) -> Any:
    """Attach an operator to a result, and record the output's stash in the lineage."""
    output = node.apply(result, kept, static, *distinct(*inputs))
    recorder.lineage.set(output, out)
    return output


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as the numbers that are added to the scores. Other masks stay as they are."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def aligned(mask: Tensor) -> bool:
    """True if rows of the mask start at multiples of 16 bytes, as the efficient kernel requires.

    PyTorch pads other masks; mesa_train does not.
    """
    return mask.shape[-1] % 8 == 0
