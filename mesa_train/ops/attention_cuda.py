"""The fused attention kernels of a GPU: flash, memory-efficient, cuDNN.

Each keeps the stashes of q, k, v and of the output (which the projection behind shares) and the
exact logsumexp, and calls its own backward on the decoded tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Stash, uncompressed

from .base import Operator, derivative, distinct

_aten = torch.ops.aten

# Heads and features of one token may share a group of codes; tokens may not.
WITHIN = (1, 3)


class Call(NamedTuple):
    """One call of attention. `stashes` are those of q, k, v; `cast` q, k, v and the mask as autocast
    casts them, `inputs` the same as they were given."""

    recorder: Recorder
    stashes: tuple[Stash, Stash, Stash]
    cast: tuple[Tensor, Tensor, Tensor, Tensor | None]
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    dropout_p: float
    causal: bool
    scale: float | None


class FlashCUDA(Operator):
    """inputs: q, k, v. stashes: q, k, v, out, logsumexp, seed, offset. static: sequence lengths,
    dropout, ..."""

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
    """inputs: q, k, v, mask. stashes: q, k, v, out, logsumexp, seed, offset, mask. static: dropout,
    causal, scale."""

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
    """inputs: q, k, v. stashes: q, k, v, out, logsumexp, seed, offset, mask. static: sequence
    lengths, dropout, ..."""

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
    """Record flash attention: no mask."""
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
    """Record memory-efficient attention: any mask."""
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
    """Record cuDNN's attention: no mask or an additive one."""
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
    """Attach an operator to a result; the output's stash stands for it from now on."""
    output = node.apply(result, kept, static, *distinct(*inputs))
    recorder.lineage.set(output, out)
    return output


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as what is added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def aligned(mask: Tensor) -> bool:
    """The efficient kernel wants rows of the mask to start at multiples of 16 bytes; PyTorch pads,
    we do not."""
    return mask.shape[-1] % 8 == 0
