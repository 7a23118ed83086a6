"""Cases of norms, activations and dropout."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, of_module, parameter, positive
from torch import nn


def _norms():
    yield Case(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, (9,), w, b),
        (activation(2, 4, 9), parameter(9), parameter(9)),
    )
    yield Case("layer_norm without affine", lambda x: F.layer_norm(x, (9,)), (activation(2, 4, 9),))
    yield Case(
        "layer_norm without bias",
        lambda x, w: F.layer_norm(x, (9,), w),
        (activation(2, 4, 9), parameter(9)),
    )
    yield Case(
        "layer_norm of two dims",
        lambda x, w, b: F.layer_norm(x, (4, 9), w, b, 1e-3),
        (activation(3, 4, 9), parameter(4, 9), parameter(4, 9)),
    )
    yield Case(
        "layer_norm of a constant",
        lambda x, w, b: F.layer_norm(x, (9,), w, b),
        (constant(4, 9), parameter(9), parameter(9)),
    )
    yield Case(
        "layer_norm frozen",
        lambda x, w, b: F.layer_norm(x, (9,), w, b),
        (activation(4, 9), constant(9), constant(9)),
    )
    yield Case(
        "layer_norm and linear",
        lambda x, w, b, v: F.linear(F.layer_norm(x, (9,), w, b), v),
        (activation(2, 4, 9), parameter(9), parameter(9), parameter(5, 9)),
    )
    yield Case("rms_norm", lambda x, w: F.rms_norm(x, (9,), w), (activation(2, 4, 9), parameter(9)))
    yield Case(
        "rms_norm without weight", lambda x: F.rms_norm(x, (9,), eps=1e-2), (activation(2, 4, 9),)
    )
    yield Case(
        "rms_norm of two dims, and linear",
        lambda x, w, v: F.linear(F.rms_norm(x, (4, 9), w), v),
        (activation(3, 4, 9), parameter(4, 9), parameter(5, 9)),
    )
    for dims, shape in ((2, ()), (3, (7,)), (4, (3, 5)), (5, (2, 3, 2))):
        inputs = (activation(4, 6, *shape), parameter(6), parameter(6))
        # Groups of two normalise to +1 and -1, and their gradient is what cancellation leaves.
        loose = {"eight": 0.1, "four": 2.0} if dims == 2 else {}
        yield Case(
            f"group_norm {dims}-D", lambda x, w, b: F.group_norm(x, 3, w, b), inputs, **loose
        )
        for training in (True, False):
            yield Case(
                f"batch_norm {dims}-D training={training}",
                lambda x, w, b, m, v, t=training: F.batch_norm(
                    x, m, v, w, b, training=t, momentum=0.3
                ),
                (*inputs, constant(6), constant(6, make=positive)),
            )
    for dims, shape in ((3, (7,)), (4, (3, 5)), (5, (2, 3, 2))):
        yield Case(
            f"instance_norm {dims}-D",
            lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
            (activation(4, 6, *shape), parameter(6), parameter(6)),
        )
    yield of_module(
        "nn.InstanceNorm2d with statistics",
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        activation(4, 6, 3, 5),
        fallback=True,
    )
    yield Case("group_norm without affine", lambda x: F.group_norm(x, 2), (activation(4, 6, 5),))
    yield Case(
        "batch_norm without statistics or affine",
        lambda x: F.batch_norm(x, None, None, training=True),
        (activation(4, 6, 3, 5),),
    )
    yield Case(
        "batch_norm of one position",
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (activation(5, 6, 1, 1), parameter(6), parameter(6)),
    )
    yield Case(
        "batch_norm and conv2d",
        lambda x, w, b, k: F.conv2d(F.batch_norm(x, None, None, w, b, training=True), k),
        (activation(4, 6, 5, 5), parameter(6), parameter(6), parameter(2, 6, 3, 3)),
    )
    yield of_module("nn.BatchNorm2d", lambda: nn.BatchNorm2d(6), activation(4, 6, 3, 5))
    for dim in (-1, 1):
        yield Case(
            f"normalize dim={dim}", lambda x, d=dim: F.normalize(x, dim=d), (activation(3, 4, 9),)
        )
    yield Case(
        "normalize under eps", lambda x: F.normalize(x, dim=-1, eps=4.0), (activation(6, 9),)
    )
    yield Case(
        "normalize p=1", lambda x: F.normalize(x, p=1.0, dim=-1), (activation(3, 9),), fallback=True
    )


def _activations():
    x = (activation(3, 4, 9),)
    for name, function in {
        "gelu": F.gelu,
        "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "torch.relu": torch.relu,
        "Tensor.relu": lambda x: x.relu(),
        "relu6": lambda x: F.relu6(4 * x),
        "leaky_relu": F.leaky_relu,
        "hardswish": lambda x: F.hardswish(2 * x),
        "mish": F.mish,
        "softplus": F.softplus,
        "elu": F.elu,
        "nn.ELU": nn.ELU(),
        "nn.Softplus": nn.Softplus(),
        "leaky_relu 0.2": lambda x: F.leaky_relu(x, 0.2),
        "leaky_relu 0.2 inplace": lambda x: F.leaky_relu(x.mul(1.5), 0.2, True),
        "F.sigmoid": F.sigmoid,
        "torch.sigmoid": torch.sigmoid,
        "Tensor.sigmoid": lambda x: x.sigmoid(),
        "torch.tanh": torch.tanh,
        "Tensor.tanh": lambda x: x.tanh(),
        "F.tanh": F.tanh,
        "relu_": lambda x: x.mul(1.5).relu_(),
        "torch.relu_": lambda x: torch.relu_(x.mul(1.5)),
        "F.relu inplace": lambda x: F.relu(x.mul(1.5), inplace=True),
        "relu6 inplace": lambda x: F.relu6(x.mul(1.5), inplace=True),
        "leaky_relu inplace": lambda x: F.leaky_relu(x.mul(1.5), 0.01, True),
        "silu inplace": lambda x: F.silu(x.mul(1.5), inplace=True),
        "hardswish inplace": lambda x: F.hardswish(x.mul(1.5), inplace=True),
        "elu inplace": lambda x: F.elu(x.mul(1.5), 1.0, True),
        "mish inplace": lambda x: F.mish(x.mul(1.5), inplace=True),
        "relu_ of a view": lambda x: x.mul(1.5).reshape(3, 36)[:].relu_(),
        "relu_ of a part": lambda x: _in_a_part(x, torch.relu_),
        "silu_ of a part": lambda x: _in_a_part(x, lambda t: F.silu(t, inplace=True)),
    }.items():
        yield Case(name, function, x)
    for name, function in {
        "softplus beta": lambda x: F.softplus(x, 2.0, 10.0),
        "elu alpha": lambda x: F.elu(x, 0.7),
        "sigmoid_": lambda x: x.mul(1.5).sigmoid_(),
    }.items():
        # elu's derivative jumps at 0 for alpha other than 1.
        yield Case(name, function, x, fallback=True, eight=0.1)
    yield from _stepped(*x)
    # PyTorch multiplies by a float32 sixth in float64 too.
    yield Case("hardsigmoid", lambda x: F.hardsigmoid(2 * x), x, rounding=1e-7)
    yield Case("glu", F.glu, (activation(3, 4, 8),))
    yield Case("glu dim=1", lambda x: F.glu(x, dim=1), (activation(3, 4, 8),))
    yield Case("SwiGLU", lambda a, b: F.silu(a) * b, (activation(3, 4, 9), activation(3, 4, 9)))
    yield Case(
        "SwiGLU of one Linear",
        lambda x, w, v: F.linear(
            F.silu(F.linear(x, w).chunk(2, -1)[0]) * F.linear(x, w).chunk(2, -1)[1], v
        ),
        (activation(4, 9), parameter(10, 9), parameter(3, 5)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "MLP",
        lambda x, w, b, v: F.linear(F.gelu(F.linear(x, w, b)), v),
        (activation(2, 4, 9), parameter(12, 9), parameter(12), parameter(5, 12)),
        eight=0.05,
        four=0.8,
    )


def _stepped(x):
    """Activations with two slopes, alone and between a norm and a convolution."""
    yield Case("hardtanh", F.hardtanh, (x,))
    yield Case("nn.ReLU6 inplace", lambda x: nn.ReLU6(True)(x.mul(4)), (x,))
    yield Case("hardtanh_", lambda x: F.hardtanh_(x.mul(1.5), -0.5, 0.7), (x,))
    yield Case("prelu", F.prelu, (x, parameter(4)), eight=0.05)
    yield Case("prelu of one slope", lambda x, w: x.prelu(w), (x, parameter(1)), eight=0.05)
    yield Case("prelu frozen", F.prelu, (x, constant(4)))
    for name, function in {
        "relu": F.relu,
        "relu_": F.relu_,
        "relu6 inplace": lambda x: F.relu6(x, inplace=True),
        "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "prelu": lambda x: F.prelu(x, x.new_full((6,), 0.3)),
        "silu_": lambda x: F.silu(x, inplace=True),
        "relu_ of a view": lambda x: x[:, :4].relu_(),
    }.items():
        yield Case(
            f"batch_norm, {name}, conv2d",
            lambda x, w, b, k, f=function: F.conv2d(
                (y := f(F.batch_norm(x, None, None, w, b, training=True))), k[:, : y.shape[1]]
            ),
            (activation(4, 6, 5, 5), parameter(6), parameter(6), parameter(2, 6, 3, 3)),
            eight=0.05,
            four=0.8,
        )


def _in_a_part(x, function):
    y = x.mul(1.5)
    function(y[:, 1:3])
    return y


def _products():
    """Products whose factors hand their stashes on."""
    x = activation(2, 4, 8)
    yield Case(
        "rms_norm written out, linear",
        lambda x, g, w: F.linear(
            g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), w
        ),
        (x, parameter(8), parameter(5, 8)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "rms_norm written out behind a linear, frozen",
        lambda x, v, g, w: F.linear(
            g * ((h := F.linear(x, v)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), w
        ),
        (x, parameter(8, 8), constant(8), parameter(5, 8)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "QuickGELU and linear",
        lambda x, v, w: F.linear((h := F.linear(x, v)) * torch.sigmoid(1.702 * h), w),
        (x, parameter(8, 8), parameter(5, 8)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "tanh behind a norm",
        lambda x, w, b, k: F.conv2d(torch.tanh(F.group_norm(x, 2, w, b)), k),
        (activation(2, 4, 5, 5), parameter(4), parameter(4), parameter(2, 4, 3, 3)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "rotary positions",
        lambda x, w, cos, sin: F.scaled_dot_product_attention(
            *[_rotated(F.linear(x, w), cos, sin).unflatten(-1, (2, 4)).transpose(1, 2)] * 3
        ),
        (x, parameter(8, 8, make=_weak), constant(4, 8), constant(4, 8)),
        eight=0.05,
        four=0.8,
    )
    yield Case(
        "rotary positions, stacked",
        lambda x, w, cos, sin: F.linear(
            (h := F.gelu(x)) * cos
            + torch.stack([-h[..., 1::2], h[..., ::2]], -1).reshape(h.shape) * sin,
            w,
        ),
        (x, parameter(8, 8), constant(4, 8), constant(4, 8)),
        eight=0.05,
        four=0.8,
    )


def _weak(*shape):
    """Weights that do not saturate a softmax."""
    return 0.3 * torch.randn(*shape)


def _rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _dropout():
    x = (activation(3, 4, 9),)
    yield Case("dropout", lambda x: F.dropout(x, 0.4), x)
    yield Case("torch.dropout", lambda x: torch.dropout(x, 0.4, True), x)
    yield Case("torch.dropout by keyword", lambda x: torch.dropout(x, p=0.4, train=True), x)
    yield Case(
        "dropout inplace", lambda x: F.dropout(x.mul(1.5), 0.4, True, True), x, fallback=True
    )
    yield Case("dropout p=1", lambda x: F.dropout(x, 1.0), x, fallback=True)
    yield Case("dropout p=0", lambda x: F.dropout(x, 0.0) * x, x)
    yield Case("dropout eval", lambda x: F.dropout(x, 0.4, False) * x, x)
    yield Case(
        "gelu, dropout, linear",
        lambda x, w: F.linear(F.dropout(F.gelu(x), 0.4), w),
        (*x, parameter(5, 9)),
        eight=0.05,
        four=0.8,
    )
    yield Case("dropout2d", lambda x: F.dropout2d(x, 0.4), (activation(3, 4, 5, 5),), fallback=True)


POINTWISE = [*_norms(), *_activations(), *_products(), *_dropout()]
