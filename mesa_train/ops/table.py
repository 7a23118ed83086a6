"""The table of operators: each recorded torch function with its row.

CONTRIBUTING.md describes how to add an operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mesa_train import kernels
from mesa_train.utils import clipped_sign as straight_through

from . import (
    activation,
    add,
    attention,
    channel_norm,
    dropout,
    linear,
    matmul,
    multiply,
    norm,
    normalize,
    softmax,
    stepped,
    views,
)
from .fallback import fallback as fallback
from .losses import cross_entropy, elementwise, log_softmax
from .narrow import clipped_sign, difference, exponential, gather, numbers, positions
from .spatial import conv, deformable, extremum, pool

Row = Callable[..., Any]

_nn = torch._C._nn

ROWS: dict[Any, Row] = {
    _nn.linear: linear.linear,  # F.linear, unless another library has replaced it
    torch.matmul: matmul.matmul,
    Tensor.matmul: matmul.matmul,
    Tensor.__matmul__: matmul.matmul,
    Tensor.__rmatmul__: matmul.reversed_matmul,
    torch.bmm: matmul.matmul,
    Tensor.bmm: matmul.matmul,
    torch.mm: matmul.matmul,
    Tensor.mm: matmul.matmul,
    torch.addmm: matmul.add_matmul,
    Tensor.addmm: matmul.add_matmul,
    torch.baddbmm: matmul.add_matmul,
    Tensor.baddbmm: matmul.add_matmul,
    torch.einsum: matmul.einsum,
    F.scaled_dot_product_attention: attention.attention,
    F.softmax: softmax.softmax,
    torch.softmax: softmax.softmax,
    Tensor.softmax: softmax.softmax,
    F.layer_norm: norm.layer_norm,
    F.rms_norm: norm.rms_norm,
    F.group_norm: channel_norm.group_norm,
    F.batch_norm: channel_norm.batch_norm,
    F.instance_norm: channel_norm.instance_norm,
    F.normalize: normalize.normalize,
    F.conv1d: conv.conv,
    F.conv2d: conv.conv,
    F.conv3d: conv.conv,
    F.conv_transpose1d: conv.conv_transpose,
    F.conv_transpose2d: conv.conv_transpose,
    F.conv_transpose3d: conv.conv_transpose,
    F.gelu: activation.smooth("gelu"),
    F.silu: activation.smooth("silu"),
    _nn.silu_: activation.smooth("silu", overwrites=True),
    F.hardswish: activation.smooth("hardswish"),
    _nn.hardswish_: activation.smooth("hardswish", overwrites=True),
    F.mish: activation.smooth("mish"),
    F.softplus: activation.smooth("softplus"),
    F.elu: activation.smooth("elu"),
    F.relu: stepped.relu,
    F.relu_: stepped.overwriting(stepped.relu),
    torch.relu: stepped.relu,
    torch.relu_: stepped.overwriting(stepped.relu),
    Tensor.relu: stepped.relu,
    Tensor.relu_: stepped.overwriting(stepped.relu),
    F.relu6: stepped.relu6,
    F.hardtanh: stepped.hardtanh,
    F.hardtanh_: stepped.overwriting(stepped.hardtanh),
    F.leaky_relu: stepped.leaky_relu,
    F.leaky_relu_: stepped.overwriting(stepped.leaky_relu),
    F.hardsigmoid: stepped.hardsigmoid,
    F.prelu: stepped.prelu,
    Tensor.prelu: stepped.prelu,
    F.sigmoid: activation.from_output("sigmoid"),
    torch.sigmoid: activation.from_output("sigmoid"),
    Tensor.sigmoid: activation.from_output("sigmoid"),
    F.tanh: activation.from_output("tanh"),
    torch.tanh: activation.from_output("tanh"),
    Tensor.tanh: activation.from_output("tanh"),
    F.glu: activation.glu,
    torch.exp: exponential.exp,
    Tensor.exp: exponential.exp,
    straight_through.clipped_sign: clipped_sign.clipped_sign,
    torch.add: add.add,
    Tensor.add: add.add,
    Tensor.add_: add.add,
    torch.sub: difference.sub,
    Tensor.sub: difference.sub,
    torch.mul: multiply.mul,
    Tensor.mul: multiply.mul,
    Tensor.mul_: multiply.mul_,
    torch.div: multiply.div,
    Tensor.div: multiply.div,
    torch.neg: multiply.neg,
    Tensor.neg: multiply.neg,
    Tensor.__neg__: multiply.neg,
    torch.eye: numbers.made(torch.eye),
    torch.ones: numbers.made(torch.ones),
    torch.ones_like: numbers.made(torch.ones),
    torch.sin: positions.function_of_table("sin"),
    Tensor.sin: positions.function_of_table("sin"),
    torch.cos: positions.function_of_table("cos"),
    Tensor.cos: positions.function_of_table("cos"),
    torch.amax: extremum.extremum,
    Tensor.amax: extremum.extremum,
    torch.amin: extremum.extremum,
    Tensor.amin: extremum.extremum,
    torch.max: pool.selected,
    Tensor.max: pool.selected,
    torch.min: pool.selected,
    Tensor.min: pool.selected,
    F.max_pool2d: pool.max_pool,
    F.max_pool3d: pool.max_pool,
    torch.max_pool2d: pool.max_pool,
    torch.max_pool3d: pool.max_pool,
    torch.clamp: stepped.clamp,
    Tensor.clamp: stepped.clamp,
    torch.gather: gather.gather,
    Tensor.gather: gather.gather,
    F.cross_entropy: cross_entropy.cross_entropy,
    F.mse_loss: elementwise.mse_loss,
    F.l1_loss: elementwise.l1_loss,
    F.smooth_l1_loss: elementwise.smooth_l1_loss,
    F.huber_loss: elementwise.huber_loss,
    F.logsigmoid: elementwise.logsigmoid,
    F.binary_cross_entropy_with_logits: elementwise.binary_cross_entropy_with_logits,
    F.log_softmax: log_softmax.log_softmax,
    torch.log_softmax: log_softmax.log_softmax,
    Tensor.log_softmax: log_softmax.log_softmax,
    torch.sum: log_softmax.sum,
    Tensor.sum: log_softmax.sum,
    F.kl_div: log_softmax.kl_div,
    F.dropout: dropout.dropout,
    torch.dropout: dropout.dropout,
    F.pad: views.pad,
    torch.cat: views.cat,
    torch.concat: views.cat,
    torch.concatenate: views.cat,
    torch.stack: views.cat,
}

# Operators of other libraries. A library may be loaded after mesa_train, or never.
_FOREIGN: dict[tuple[str, str], Row] = {("torchvision", "deform_conv2d"): deformable.deform_conv}

# To recompute these functions moves data and computes nothing.
VIEWS = frozenset(
    """
    transpose permute reshape view flatten unflatten squeeze unsqueeze contiguous unbind
    chunk split tensor_split select narrow movedim moveaxis swapaxes swapdims roll flip
    expand repeat repeat_interleave tile clone unsafe_chunk unsafe_split split_with_sizes adjoint t
    """.split()
)
_CASTS = frozenset(
    """
    to float half bfloat16 double
    """.split()
)
for _name in VIEWS:
    for _owner in (torch, Tensor):
        if hasattr(_owner, _name):
            ROWS[getattr(_owner, _name)] = views.view
for _name in _CASTS:
    ROWS[getattr(Tensor, _name)] = views.cast
ROWS[Tensor.__getitem__] = views.view
for _name in ("T", "mT"):
    ROWS[getattr(Tensor, _name).__get__] = views.view
# torch.compile does not find Tensor.unflatten in a table (torch 2.14), and fails on its own guard.
# So its row is for eager calls only.
EAGER: dict[Any, Row] = {Tensor.unflatten: ROWS.pop(Tensor.unflatten)}


def prepare() -> None:
    """Load kernels and foreign rows now.

    Otherwise the first forward would, and torch.compile may trace it.
    """
    kernels.load()
    link()


def link() -> None:
    """Add the rows of other libraries' operators that were loaded since the last call."""
    for library, name in list(_FOREIGN):
        if library in sys.modules and hasattr(getattr(torch.ops, library), name):
            operator = getattr(getattr(torch.ops, library), name)
            ROWS[operator] = _FOREIGN.pop((library, name))
