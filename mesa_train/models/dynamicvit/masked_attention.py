"""Attention that a 0/1 policy masks, with the gradient that brings a dropped token back.

For logits x, policy P and N tokens, the authors' attention is

    P_ij = policy_j, but P_ii = 1        M_i = max_j x_ij, dropped tokens included
    e_ij = exp(x_ij - M_i) P_ij          a_ij = (e_ij + eps / N) / (sum_j e_ij + eps)

A dropped token attends to itself and to kept tokens. The gradient of P_ij at a dropped token j is
exp(x_ij - M_i) / sum * (v_j - out_i). A mask of -inf or of bools has the same output, but no such
gradient.

With s_ij = exp(x_ij - C_i) for any constant C_i, and m_i = max_j s_ij, a equals

    a_ij = (s_ij P_ij + eps m_i / N) / (sum_j s_ij P_ij + eps m_i)

and a @ v needs no masked copy of s:

    out_i = (s @ (policy v) + s_ii (1 - policy_i) v_i + eps m_i mean(v)) / (the same for v = 1)

Only s is saved for the backward, one tensor (B, heads, N, N). The authors' formulation saves four.

s is an exponential, and no softmax: if a dropped token has most of a row, the row of `a` is made of
small s_ij. mesa_train saves an exponential with a relative error of 2**-9, and a softmax with an error
of 1/510 of the row's largest element.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def masked_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float) -> Tensor:
    """Attention in which `policy` masks the keys; differentiable in all four tensors.

    The exponential and the divisor are float32 (float64 for float64 tensors), also under autocast.

    Args:
        q, k, v: (B, heads, N, head_dim).
        policy: (B, N, 1), 1 for kept tokens and 0 for dropped tokens.
        scale: of the logits.
    Returns:
        (B, heads, N, head_dim), in the dtype of `v`.
    """
    logits = (q * scale) @ k.transpose(-2, -1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    keep = policy.unsqueeze(1).to(wide)  # (B, 1, N, 1), by key
    # Copied, because a view that is saved for the backward would keep all of `weights` in memory.
    diagonal = weights.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-1)
    own = diagonal * (1 - keep)
    floor = EPS * weights.amax(-1, keepdim=True)
    total = (weights * keep.transpose(-2, -1)).sum(-1, keepdim=True) + own + floor
    numerator = weights.to(v.dtype) @ (v * keep.to(v.dtype))
    numerator = numerator + own * v + floor * v.mean(-2, keepdim=True)
    # A product and not a quotient: mesa_train saves codes of a product's factors.
    return (numerator * total.reciprocal()).to(v.dtype)
