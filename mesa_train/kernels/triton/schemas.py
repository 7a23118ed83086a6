"""Fused forwards: a norm, an activation or a softmax, and its codes in the same pass.

Without them the data is read in two passes. There are Triton kernels for GPUs and C++ kernels for
the CPU.

Unlike all other operators, these compute a forward. So their output is close to PyTorch's own, but
not equal bit for bit. They are used only if the policy selects them (`forward="fused"`).

This file also defines an activation's backward that sums its columns. It is faster on GPUs only.
"""
# ruff: noqa: ARG001 (a fake takes all the arguments of its operator)

from __future__ import annotations

import torch
from torch import Tensor

from mesa_train.kernels import reference, schemas


def _norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    schemas._check_encode(x, bits, group_size)
    schemas._check_vector("weight", weight, x.shape[1])
    schemas._check_vector("bias", bias, x.shape[1])
    codes, scales = schemas._encoded(x, bits, group_size)
    rstd = x.new_empty((x.shape[0],), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), rstd, codes, scales


def norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm or RMSNorm, and the codes of the normalised rows.

    Args:
        x: (rows, cols).
        weight: (cols,) or None.
        bias: (cols,) or None.
        eps: added to the variance.
        centered: True for LayerNorm, False for RMSNorm.
        dtype: the dtype of the output.
        bits: 8, 4 or 2.
        group_size: elements that share one scale.
        stochastic: stochastic rounding instead of nearest.
        seed: seed of stochastic rounding.
    Returns:
        The output (rows, cols), rstd (rows,), and the codes and scales of the normalised rows.
    """
    wide = x.to(torch.float32)
    mean = wide.mean(1) if centered else None
    value = wide if mean is None else wide - mean.unsqueeze(1)
    rstd = (value.square().mean(1) + eps).rsqrt()
    value = value * rstd.unsqueeze(1)
    codes, scales = reference.affine_encode(value, bits, group_size, stochastic, seed)
    if weight is not None:
        value = value * weight.to(torch.float32)
    if bias is not None:
        value = value + bias.to(torch.float32)
    return value.to(dtype).contiguous(), rstd, codes, scales


def _activation_encode(
    x: Tensor, kind: str, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    schemas._check_kind(kind)
    schemas._check_encode(x, bits, group_size)
    return x.new_empty(x.shape), *schemas._encoded(x, bits, group_size)


def activation_encode(
    x: Tensor, kind: str, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """kind(x), (rows, cols) in x's dtype, and the codes and scales of x."""
    y = reference.ACTIVATIONS[kind][0](x.to(torch.float32)).to(x.dtype)
    return y.contiguous(), *reference.affine_encode(x, bits, group_size, stochastic, seed)


def _softmax_encode(
    x: Tensor, dtype: torch.dtype, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    schemas._check_encode(x, bits, group_size)
    return x.new_empty(x.shape, dtype=dtype), *schemas._encoded(x, bits, group_size)


def softmax_encode(
    x: Tensor, dtype: torch.dtype, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of each row of (rows, cols), in `dtype`, and the codes and scales of the output."""
    y = x.to(torch.float32).softmax(1).to(dtype)
    return y, *reference.affine_encode(y, bits, group_size, stochastic, seed)


def _activation_pair_sum(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, y = schemas._activation_pair(grad, codes, scales, bits, kind)
    return dx, y, grad.new_empty((grad.shape[1],), dtype=torch.float32)


def activation_pair_sum(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """grad * kind'(decoded), kind(decoded), and the column sums of the first in float32.

    The first two are (rows, cols) in grad's dtype.
    """
    dx, y = reference.activation_pair(grad, codes, scales, bits, kind)
    return dx, y, dx.to(torch.float32).sum(0)


schemas._define(
    "norm_encode(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered,"
    " ScalarType dtype, int bits, int group_size, bool stochastic, int seed)"
    " -> (Tensor y, Tensor rstd, Tensor codes, Tensor scales)",
    _norm_encode,
    norm_encode,
)
schemas._define(
    "activation_encode(Tensor x, str kind, int bits, int group_size, bool stochastic, int seed)"
    " -> (Tensor y, Tensor codes, Tensor scales)",
    _activation_encode,
    activation_encode,
)
schemas._define(
    "softmax_encode(Tensor x, ScalarType dtype, int bits, int group_size, bool stochastic, int seed)"
    " -> (Tensor y, Tensor codes, Tensor scales)",
    _softmax_encode,
    softmax_encode,
)
schemas._define(
    "activation_pair_sum(Tensor grad, Tensor codes, Tensor scales, int bits, str kind)"
    " -> (Tensor dx, Tensor y, Tensor total)",
    _activation_pair_sum,
    activation_pair_sum,
)
