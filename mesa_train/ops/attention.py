"""Scaled dot product attention.

The fused kernels save the stashes of q, k, v and of the output, and the exact logsumexp. The
projection behind shares the output's stash. The fused backward of PyTorch is called on the decoded
tensors.

For short sequences in half precision on a CPU, mesa_train has a faster backward, which reads only
q, k and v.

In some cases PyTorch runs its unfused form, for example if a mask needs a gradient. Then the codes
of the attention weights are saved in addition to q, k and v. With `recompute="linear"`, and with
dropout on the weights, the weights are recomputed instead, from the same random numbers. To
recompute the weights, the mask must be saved. If the mask takes more memory than the codes,
`recompute="linear"` saves the codes and not the mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train.codecs.affine import Affine
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, uncompressed
from mesa_train.stash.tensors import autocasts, of_parameter
from mesa_train.utils import attention_backend
from mesa_train.utils.attention_backend import FUSES_3D, described, traced_kernel

from . import attention_cuda
from .attention_cuda import WITHIN, Call, recorded
from .base import Operator, derivative, distinct, kept_first, sum_to
from .masks import additive, attention_mask, cast_mask, cast_operand
from .packed_qkv import keep_each
from .views import view

_aten = torch.ops.aten

# The return values of torch._fused_sdp_choice.
_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3
_TRACED = {
    attention_backend.MATH: _MATH,
    attention_backend.FLASH: _FLASH,
    attention_backend.EFFICIENT: _EFFICIENT,
    attention_backend.CUDNN: _CUDNN,
}


class FlashCPU(Operator):
    """Flash attention on a CPU.

    inputs: q, k, v (B, H, N, D).
    stashes: q, k, v, out, logsumexp, mask.
    static: causal, scale.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        causal, scale = static
        dtype = grad.dtype
        operands = [saved.get(i, dtype) for i in range(4)]
        mask = saved[5] if saved.specs[5] is not None else None
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *operands, saved[4], 0.0, causal, attn_mask=mask, scale=scale
        )


class Short(Operator):
    """Attention over short sequences, in half precision on a CPU.

    `kernels/short_attention.py` recomputes the weights from the decoded q and k.

    inputs: q (B, H, N, D), k, v (B, H, M, D).
    stashes: q, k, v.
    static: scale.
    """

    @derivative("attention")
    def backward(
        saved: Saved, scale: float, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        operands = [saved.get(i, grad.dtype) for i in range(3)]
        return torch.ops.mesa_train.short_attention_backward.default(grad, *operands, scale)


# The largest number of scores per head for which `Short` is chosen.
_SHORT = 512 * 512


class Unfused(Operator):
    """Attention that saves the codes of its weights.

    inputs: q, k, v, mask.
    stashes: q, k, v, weights.
    static: dtype, scale, shape of the mask.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dtype, scale, mask_shape = static
        g = grad.to(dtype)
        q, k, v, weights = [saved.get(i, dtype) for i in range(4)]
        dv = weights.mT @ g if needs[2] else None
        if not (needs[0] or needs[1] or needs[3]):
            return None, None, dv, None
        dscores = weights * (g @ v.mT)
        dscores = dscores - weights * dscores.sum(-1, keepdim=True)
        dq = (dscores @ k) * scale if needs[0] else None
        dk = (dscores.mT @ q) * scale if needs[1] else None
        return dq, dk, dv, sum_to(dscores, mask_shape) if needs[3] else None


class Recomputed(Operator):
    """Attention that recomputes its weights.

    inputs: q, k, v, mask.
    stashes: q, k, v, mask.
    static: dtype, keywords, the generator's state before the call, whether a kernel may be fused.
    """

    @derivative("attention")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        dtype, keywords, state, fused = static
        q, k, v = [saved.get(i, dtype).detach().requires_grad_(needs[i]) for i in range(3)]
        mask = None
        if saved.specs[3] is not None:
            numbers = None if saved.specs[3].dtype is torch.bool else dtype
            mask = saved.get(3, numbers).detach().requires_grad_(needs[3])
        with torch.random.fork_rng(
            [grad.device] if grad.is_cuda else [], enabled=state is not None
        ):
            if state is not None:
                _generator(grad.device).set_state(state)
            with torch.enable_grad():
                out = _attend(F.scaled_dot_product_attention, (q, k, v, mask), keywords, fused)
        wanted = [t for t in (q, k, v, mask) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
        return tuple([next(found) if need else None for need in needs])


def attention(
    recorder: Recorder,
    func: Any,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Row of torch.nn.functional.scaled_dot_product_attention."""
    if not recorder.covers("attention", query, key, value) or query.dim() < 3 or not query.numel():
        return NotImplemented
    rest = (dropout_p, is_causal, scale, enable_gqa)
    if query.dim() == key.dim() == value.dim() == 3:
        # As in PyTorch, the batch becomes the heads.
        q, k, v = [view(recorder, Tensor.unsqueeze, t, 0) for t in (query, key, value)]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = view(recorder, Tensor.unsqueeze, attn_mask, 0)
        output = _attention(recorder, func, q, k, v, attn_mask, *rest, fused=FUSES_3D)
        return view(recorder, Tensor.squeeze, output, 0)
    return _attention(recorder, func, query, key, value, attn_mask, *rest)


# q, k, v and the mask.
_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _attention(
    recorder: Recorder,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    fused: bool = True,
) -> Any:
    """Record attention. `fused`: whether PyTorch may choose a fused kernel."""
    device = query.device.type
    q, k, v = query, key, value
    mask = attn_mask
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.no_grad():
            q, k, v = [cast_operand(t, dtype) for t in (query, key, value)]
            if mask is not None and mask.is_floating_point():
                mask = cast_mask(recorder, mask, dtype)
    inputs = (query, key, value, attn_mask)
    choice = _MATH
    if fused and query.dim() == 4 and not enable_gqa:
        choice = _backend((q, k, v, mask), inputs, dropout_p, is_causal, scale)
    first, second, third = keep_each(recorder, (query, key, value), "attention", "qkv", WITHIN)
    stashes, cast = (first, second, third), (q, k, v, mask)
    call = Call(recorder, stashes, cast, inputs, dropout_p, is_causal, scale)
    if choice == _FLASH and device == "cpu" and dropout_p == 0:
        return _flash_cpu(call)
    if choice == _FLASH and device == "cuda":
        return attention_cuda.flash(call)
    if choice == _EFFICIENT and device == "cuda":
        return attention_cuda.efficient(call)
    # cuDNN has no gradient of the mask.
    trained = attn_mask is not None and attn_mask.requires_grad
    if choice == _CUDNN and device == "cuda" and not trained:
        return attention_cuda.cudnn(call)
    rebuild = recorder.context.rules["attention", "q"].rebuild_linear
    rebuild = rebuild and not _mask_costs_more(recorder, q, k, mask, attn_mask)
    if not enable_gqa and dropout_p == 0 and not rebuild and device in ("cpu", "cuda"):
        return _unfused(call)
    return _recomputed(func, call, enable_gqa, fused)


def _backend(
    cast: _Operands,
    inputs: _Operands,
    dropout_p: float,
    causal: bool,
    scale: float | None,
) -> int:
    """The kernel that PyTorch chooses for these operands.

    The choice also depends on which operands require gradients. While tracing, the casts do not say
    this, so `inputs` are asked.
    """
    q, k, v, mask = cast
    if not torch.compiler.is_compiling():
        return torch._fused_sdp_choice(q, k, v, mask, dropout_p, causal, scale=scale)
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return _MATH
    described_mask = None
    if mask is not None and inputs[3] is not None:
        described_mask = described(mask, inputs[3].requires_grad)
    kernel = traced_kernel(
        device,
        described(q, inputs[0].requires_grad),
        described(k, inputs[1].requires_grad),
        described(v, inputs[2].requires_grad),
        described_mask,
        # With dynamic shapes a float may be symbolic, and so is its comparison.
        True if dropout_p > 0 else False,  # noqa: SIM210
        causal,
    )
    return _TRACED[kernel]


def _flash_cpu(call: Call) -> Any:
    """Record the CPU's flash attention, or `Short` for short sequences."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
    mask = _numbers(mask, q.dtype)
    result, logsumexp = recorder.exactly(
        _aten._scaled_dot_product_flash_attention_for_cpu,
        *(q, k, v, 0.0, call.causal),
        attn_mask=mask,
        scale=call.scale,
    )
    if _short(q, k, mask, call.causal):
        return Short.apply(result, call.stashes, _factor(call), *distinct(*call.inputs[:3]))
    out = recorder.keep(result, "attention", "out", WITHIN)
    kept = (
        *call.stashes,
        out,
        uncompressed(logsumexp),
        attention_mask(recorder, call.inputs[3], mask, -math.inf),
    )
    static = (call.causal, call.scale)
    return recorded(recorder, FlashCPU, result, out, kept, static, call.inputs[:3])


def _factor(call: Call) -> float:
    """The factor of the scores."""
    return call.cast[0].shape[-1] ** -0.5 if call.scale is None else call.scale


def _short(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """True if `Short` computes the backward of this call."""
    return (
        mask is None
        and not causal
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[:2] == k.shape[:2]
        and q.shape[2] * k.shape[2] <= _SHORT
    )


def _unfused(call: Call) -> Any:
    """Record PyTorch's unfused attention, and save the attention weights."""
    recorder, (q, k, v, mask) = call.recorder, call.cast
    mask = _numbers(mask, q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        result, weights = recorder.exactly(
            _aten._scaled_dot_product_attention_math,
            *(q, k, v, mask, 0.0, call.causal),
            scale=call.scale,
        )
    kept = (*call.stashes, recorder.keep(weights, "softmax", "output"))
    trained = mask if mask is not None and mask.is_floating_point() else None
    static = (q.dtype, _factor(call), None if trained is None else tuple(trained.shape))
    return Unfused.apply(
        result,
        kept,
        static,
        *distinct(*call.inputs[:3]),
        None if trained is None else call.inputs[3],
    )


def _mask_costs_more(
    recorder: Recorder, q: Tensor, k: Tensor, mask: Tensor | None, given: Tensor | None
) -> bool:
    """True if a mask takes more memory than the codes of the attention weights.

    `given`: the mask that the user passed; `mask` may be autocast's copy of it.

    The weights are recomputed from the mask. A mask per image, as relative positions make it, takes
    more.
    """
    if mask is None or given is None or (mask is given and of_parameter(mask)):
        return False
    if recorder.known(given, "attention", "q") is not None:
        return False
    if mask.dtype is torch.bool:
        size = mask.numel() // 8
    elif torch.compiler.is_compiling():
        size = mask.numel() * mask.element_size()
    else:
        size = mask.untyped_storage().nbytes()
    rows, cols = q.numel() // q.shape[-1], k.shape[-2]
    rule = recorder.context.rules["softmax", "output"]
    if isinstance(rule.codec, Affine) and rows * cols * q.element_size() >= rule.min_bytes:
        return size > rule.codec.bytes(rows, cols)
    return size > rows * cols * q.element_size()


def _attend(func: Any, operands: _Operands, keywords: dict[str, Any], fused: bool) -> Tensor:
    """Call PyTorch's attention; without the first dim if it may not choose a fused kernel."""
    q, k, v, mask = operands
    if fused:
        return func(q, k, v, attn_mask=mask, **keywords)
    mask = mask[0] if mask is not None and mask.dim() == 4 else mask
    return func(q[0], k[0], v[0], attn_mask=mask, **keywords)[None]


def _recomputed(func: Any, call: Call, enable_gqa: bool, fused: bool) -> Any:
    """Record attention whose backward recomputes the weights."""
    q, mask = call.cast[0], call.cast[3]
    keywords = {
        "dropout_p": call.dropout_p,
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": enable_gqa,
    }
    state = _generator(q.device).get_state() if call.dropout_p > 0 else None
    given = call.inputs[3]
    stash = None if given is None else call.recorder.known(given, "attention", "q")
    if stash is None:
        stash = attention_mask(call.recorder, given, mask, None)
    kept = kept_first(call.recorder, *call.stashes, stash)
    result = call.recorder.exactly(_attend, func, call.cast, keywords, fused)
    trained = call.inputs[3] if mask is not None and mask.is_floating_point() else None
    return Recomputed.apply(
        result, kept, (q.dtype, keywords, state, fused), *distinct(*call.inputs[:3], trained)
    )


def _numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers that are added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return additive(mask, dtype, -math.inf)


def _generator(device: torch.device) -> torch.Generator:
    """The default generator of a device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]
