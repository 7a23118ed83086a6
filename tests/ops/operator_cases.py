"""The table of operator calls that every property in test_operators.py is tried on, and how one is run.

A case is a function of tensors and what each tensor is: an activation (it needs a gradient and is no leaf, so that it
is coded), a parameter (a leaf that needs a gradient) or a constant.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.ops import deform_conv2d

from mesa_train import PRESETS, Policy, compress


@dataclasses.dataclass(frozen=True)
class Input:
    """role: "activation", "parameter" or "constant". make: from a shape to a float64 tensor, or a dtype of its own."""

    role: str
    shape: tuple[int, ...]
    make: Callable = torch.randn
    cast: bool = True


def activation(*shape, make=torch.randn):
    return Input("activation", shape, make)


def parameter(*shape, make=torch.randn):
    return Input("parameter", shape, make)


def constant(*shape, make=torch.randn, cast=True):
    return Input("constant", shape, make, cast)


def positive(*shape):
    return torch.rand(*shape) + 0.5


def mask_of(*shape):
    """Bools with no row empty."""
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True
    return mask


@dataclasses.dataclass(frozen=True)
class Case:
    """fallback: no operator of ours takes part. rounding: of a lossless gradient, relative L2. eight, four: of a coded
    one. 8 bits in groups of a Gaussian's row are 0.7 % (rms) off, 4 bits with stochastic rounding 16 %; a function of
    two coded operands adds both."""

    name: str
    function: Callable
    inputs: tuple[Input, ...]
    fallback: bool = False
    rounding: float = 1e-10
    eight: float = 0.03
    four: float = 0.4

    def __str__(self):
        return self.name


@dataclasses.dataclass
class Tensors:
    """leaves: what gradients are asked for. arguments: what the function is called with."""

    leaves: list
    arguments: list
    constants: list


def tensors(case, dtype=torch.float64, layout=None, requires_grad=True, seed=0):
    torch.manual_seed(seed)
    made = Tensors([], [], [])
    for kind in case.inputs:
        value = kind.make(*kind.shape)
        if kind.cast:
            value = value.to(dtype)
        if kind.role == "constant":
            made.constants.append(value)
            made.arguments.append(value)
            continue
        leaf = value.requires_grad_(requires_grad)
        made.leaves.append(leaf)
        if kind.role == "parameter":
            made.arguments.append(leaf)
        else:
            made.arguments.append(leaf.clone() if layout is None else layout(leaf))
    return made


def call(case, made, policy):
    """The outputs that can have a gradient."""
    torch.manual_seed(1)
    with contextlib.nullcontext() if policy is None else compress(policy):
        output = case.function(*made.arguments)
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return [o for o in outputs if o is not None]


def gradients(outputs, leaves, **kwargs):
    generator = torch.Generator().manual_seed(2)
    outputs = [o for o in outputs if o.requires_grad]
    weights = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs
    ]
    return torch.autograd.grad(outputs, leaves, weights, **kwargs)


def run(case, policy, dtype=torch.float64, layout=None):
    """(outputs, gradients, the inputs' Tensors)."""
    made = tensors(case, dtype, layout)
    outputs = call(case, made, policy)
    return outputs, gradients(outputs, made.leaves), made


def error(found, expected):
    """Relative L2 over several tensors."""
    difference = sum(
        (f.double() - e.double()).square().sum() for f, e in zip(found, expected, strict=True)
    )
    size = sum(e.double().square().sum() for e in expected)
    return (difference / size.clamp_min(1e-300)).sqrt().item()


LOSSLESS = Policy(bits=32, min_bytes=0)
EIGHT = Policy(min_bytes=0)
FOUR = Policy(bits=4, min_bytes=0)
TWO = Policy(bits=2, min_bytes=0)
EVERY = {name: dataclasses.replace(p, min_bytes=0) for name, p in PRESETS.items()} | {
    "two bits": TWO
}


def of_module(name, factory, *inputs, call=lambda module, *args: module(*args), **kwargs):
    """A case of a module: its parameters are inputs, its buffers are copied before each call."""
    torch.manual_seed(0)
    module = factory()
    names = [n for n, _ in module.named_parameters()]
    # Weights of the size a trained network has, so that softmaxes do not saturate.
    weights = [
        parameter(*p.shape, make=lambda *s: 0.3 * torch.randn(*s))
        for _, p in module.named_parameters()
    ]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, *args):
            return call(self.inner, *args)

    wrapper = Call()

    def function(*args):
        dtype = args[0].dtype
        state = {f"inner.{n}": p for n, p in zip(names, args[len(inputs) :], strict=True)}
        for n, b in module.named_buffers():
            state[f"inner.{n}"] = b.clone().to(dtype) if b.is_floating_point() else b.clone()
        return functional_call(wrapper, state, args[: len(inputs)])

    return Case(name, function, (*inputs, *weights), **kwargs)


def _linear():
    for dims, shape in enumerate([(9,), (3, 9), (2, 3, 9), (2, 3, 2, 9)], 1):
        yield Case(
            f"linear {dims}-D", F.linear, (activation(*shape), parameter(5, 9), parameter(5))
        )
    yield Case("linear without bias", F.linear, (activation(4, 9), parameter(5, 9)))
    yield Case(
        "linear, weight by keyword",
        lambda x, w: F.linear(input=x, weight=w),
        (activation(4, 9), parameter(5, 9)),
    )
    yield Case(
        "linear wider than a group", F.linear, (activation(3, 200), parameter(5, 200), parameter(5))
    )
    yield Case("linear of a constant", F.linear, (constant(4, 9), parameter(5, 9), parameter(5)))
    yield Case("linear by a constant", F.linear, (activation(4, 9), constant(5, 9), constant(5)))
    yield Case(
        "linear with only a bias trained", F.linear, (constant(4, 9), constant(5, 9), parameter(5))
    )
    yield Case(
        "linear with an activation as weight", F.linear, (activation(4, 9), activation(5, 9))
    )


def _matmul():
    yield Case("addmm", torch.addmm, (parameter(6), activation(4, 5), parameter(5, 6)))
    yield Case(
        "addmm beta alpha",
        lambda b, x, y: b.addmm(x, y, beta=0.5, alpha=2.0),
        (activation(4, 6), activation(4, 5), activation(5, 6)),
    )
    yield Case(
        "addmm by keyword",
        lambda b, x, y: torch.addmm(b, mat1=x, mat2=y),
        (parameter(6), activation(4, 5), parameter(5, 6)),
        fallback=True,
    )
    yield Case(
        "baddbmm", torch.baddbmm, (activation(2, 4, 6), activation(2, 4, 5), activation(2, 5, 6))
    )
    yield Case(
        "baddbmm beta alpha, broadcast",
        lambda b, x, y: torch.baddbmm(b, x, y, beta=0.25, alpha=3),
        (parameter(1, 1, 6), activation(2, 4, 5), activation(2, 5, 6)),
    )
    yield Case("matmul 2-D 2-D", torch.matmul, (activation(4, 5), activation(5, 6)))
    yield Case("matmul N-D 2-D", torch.matmul, (activation(2, 3, 4, 5), activation(5, 6)))
    yield Case("matmul 2-D N-D", torch.matmul, (activation(4, 5), activation(3, 5, 6)))
    yield Case("matmul N-D N-D", torch.matmul, (activation(2, 3, 4, 5), activation(2, 3, 5, 6)))
    yield Case(
        "matmul broadcasting batch", torch.matmul, (activation(2, 1, 4, 5), activation(3, 5, 6))
    )
    yield Case("matmul vector", torch.matmul, (activation(4, 5), activation(5)), fallback=True)
    yield Case(
        "matmul by keyword",
        lambda x, y: torch.matmul(input=x, other=y),
        (activation(4, 5), activation(5, 6)),
    )
    yield Case("matmul with itself", lambda x: x @ x.mT, (activation(2, 4, 5),))
    yield Case("@", lambda x, y: x @ y, (activation(2, 4, 5), parameter(5, 6)))
    yield Case("@ of a constant", lambda x, y: x @ y, (constant(2, 4, 5), activation(2, 5, 6)))
    yield Case(
        "__rmatmul__", lambda x, y: y.__rmatmul__(x), (activation(2, 4, 5), activation(2, 5, 6))
    )
    yield Case("bmm", torch.bmm, (activation(2, 4, 5), activation(2, 5, 6)))
    yield Case(
        "bmm by keyword",
        lambda x, y: torch.bmm(x, mat2=y),
        (activation(2, 4, 5), activation(2, 5, 6)),
        fallback=True,
    )
    yield Case("Tensor.bmm", lambda x, y: x.bmm(y), (activation(2, 4, 5), activation(2, 5, 6)))
    yield Case("mm", torch.mm, (activation(4, 5), activation(5, 6)))
    for equation, left, right in [
        ("bhnd,bhmd->bhnm", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bnc,hc->bhn", (2, 4, 5), (3, 5)),
        ("ij,kj->ikj", (3, 5), (2, 5)),
        ("ab,cd->abcd", (2, 3), (2, 2)),
        ("bnc , cd -> bnd", (2, 4, 5), (5, 3)),
    ]:
        yield Case(
            f"einsum {equation}",
            lambda x, y, e=equation: torch.einsum(e, x, y),
            (activation(*left), activation(*right)),
        )
    for equation, left, right in [
        ("ij,kl->ik", (3, 5), (2, 4)),  # an index is summed over that the other does not have
        ("...i,ij->...j", (2, 3, 4), (4, 5)),
        ("ii,ij->j", (4, 4), (4, 5)),
        ("ij,jk", (3, 4), (4, 5)),
        ("ij,ij->ij", (3, 4), (1, 4)),  # broadcasting
    ]:
        yield Case(
            f"einsum {equation} (fallback)",
            lambda x, y, e=equation: torch.einsum(e, x, y),
            (activation(*left), activation(*right)),
            fallback=True,
        )
    yield Case(
        "einsum of a list",
        lambda x, y: torch.einsum("ij,jk->ik", [x, y]),
        (activation(3, 4), activation(4, 5)),
    )
    yield Case(
        "einsum of three",
        lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z),
        (activation(3, 4), activation(4, 5), activation(5, 2)),
        fallback=True,
    )


def _attention():
    sdpa = F.scaled_dot_product_attention
    qkv = (activation(2, 3, 7, 8), activation(2, 3, 5, 8), activation(2, 3, 5, 8))
    same = (activation(2, 3, 6, 8),) * 3
    # Softmax's arguments are exponentiated: at 4 bits an unscaled random q and k lose most.
    loose = {"four": 0.8, "eight": 0.05}
    yield Case("attention", sdpa, qkv, **loose)
    yield Case(
        "attention of a packed qkv",
        lambda x: sdpa(*x.unbind(0)),
        (activation(3, 2, 3, 6, 8),),
        **loose,
    )
    yield Case(
        "attention of one tensor", lambda x: sdpa(x, x, x), (activation(2, 3, 6, 8),), **loose
    )
    yield Case("attention causal", lambda q, k, v: sdpa(q, k, v, is_causal=True), same, **loose)
    yield Case("attention scale", lambda q, k, v: sdpa(q, k, v, scale=0.3), qkv, **loose)
    yield Case(
        "attention bool mask",
        lambda q, k, v, m: sdpa(q, k, v, m),
        (*qkv, constant(2, 1, 7, 5, make=mask_of, cast=False)),
        **loose,
    )
    yield Case(
        "attention float mask", lambda q, k, v, m: sdpa(q, k, v, m), (*qkv, constant(7, 5)), **loose
    )
    yield Case(
        "attention mask with a gradient",
        lambda q, k, v, m: sdpa(q, k, v, m),
        (*qkv, parameter(1, 3, 7, 5)),
        **loose,
    )
    yield Case(
        "attention mask with a gradient, scale",
        lambda q, k, v, m: sdpa(q, k, v, m, scale=0.5),
        (*qkv, activation(2, 3, 7, 5)),
        **loose,
    )
    yield Case("attention dropout", lambda q, k, v: sdpa(q, k, v, dropout_p=0.3), qkv, **loose)
    yield Case(
        "attention dropout and mask",
        lambda q, k, v, m: sdpa(q, k, v, m, dropout_p=0.3),
        (*qkv, parameter(3, 7, 5)),
        **loose,
    )
    yield Case(
        "attention GQA",
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        (activation(2, 4, 6, 8), activation(2, 2, 6, 8), activation(2, 2, 6, 8)),
        **loose,
    )
    yield Case(
        "attention 3-D",
        sdpa,
        (activation(3, 7, 8), activation(3, 5, 8), activation(3, 5, 8)),
        **loose,
    )
    yield Case("attention 5-D", sdpa, (activation(2, 2, 3, 4, 8),) * 3, **loose)
    yield Case(
        "attention values of another width",
        sdpa,
        (activation(2, 3, 7, 8), activation(2, 3, 5, 8), activation(2, 3, 5, 4)),
        **loose,
    )
    yield Case(
        "attention heads aside",
        lambda x: (
            sdpa(*x.view(2, 6, 3, 3, 8).permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(2, 6, 24)
        ),
        (activation(2, 6, 72),),
        **loose,
    )
    yield Case(
        "attention of constant q, k",
        sdpa,
        (constant(2, 3, 6, 8), constant(2, 3, 6, 8), activation(2, 3, 6, 8)),
        **loose,
    )
    yield Case(
        "attention by hand",
        lambda q, k, v: ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v,
        qkv,
        **loose,
    )
    for weights in (True, False):
        yield of_module(
            f"MultiheadAttention need_weights={weights}",
            lambda: nn.MultiheadAttention(12, 3, batch_first=True),
            activation(2, 5, 12),
            call=lambda m, x, weights=weights: m(x, x, x, need_weights=weights),
            **loose,
        )
    yield of_module(
        "MultiheadAttention key padding, dropout",
        lambda: nn.MultiheadAttention(12, 3, dropout=0.2),
        activation(5, 2, 12),
        constant(2, 5, make=lambda *s: ~mask_of(*s), cast=False),
        call=lambda m, x, mask: m(x, x, x, key_padding_mask=mask),
        **loose,
    )
    for norm_first in (True, False):
        yield of_module(
            f"TransformerEncoderLayer norm_first={norm_first}",
            lambda norm_first=norm_first: nn.TransformerEncoderLayer(
                12, 3, 20, dropout=0.1, activation="gelu", norm_first=norm_first, batch_first=True
            ),
            activation(2, 5, 12),
            **loose,
        )


def _softmax():
    x = (activation(3, 4, 9),)
    yield Case("torch.softmax", lambda x: torch.softmax(x, -1), x)
    yield Case("F.softmax", lambda x: F.softmax(x, dim=1), x)
    yield Case("Tensor.softmax", lambda x: x.softmax(0), x)
    yield Case("softmax in a wider dtype", lambda x: x.softmax(-1, dtype=torch.float64), x)
    yield Case("softmax and matmul", lambda x, y: x.softmax(-1) @ y, (*x, activation(3, 9, 5)))


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


def _in_a_part(x, function):
    y = x.mul(1.5)
    function(y[:, 1:3])
    return y


def deform_conv(x, offset, weight, bias=None, mask=None, stride=2, padding=0):
    """torchvision's, which has no kernel for bfloat16 on a CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = [None if t is None else t.to(wide) for t in (x, offset, weight, bias, mask)]
    *tensors, mask = tensors
    return deform_conv2d(*tensors, stride=stride, padding=padding, mask=mask).to(x.dtype)


def _conv():
    for dims in (1, 2, 3):
        conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        size = (7, 6, 5)[:dims]
        inputs = (activation(2, 4, *size), parameter(6, 4, *[3] * dims), parameter(6))
        yield Case(f"conv{dims}d", conv, inputs)
        yield Case(
            f"conv{dims}d stride dilation padding",
            lambda x, w, b, c=conv: c(x, w, b, stride=2, padding=2, dilation=2),
            inputs,
        )
        yield Case(f"conv{dims}d same", lambda x, w, b, c=conv: c(x, w, b, padding="same"), inputs)
        yield Case(
            f"conv{dims}d depthwise",
            lambda x, w, c=conv: c(x, w, groups=4, padding=1),
            (activation(2, 4, *size), parameter(4, 1, *[3] * dims)),
        )
    x = activation(2, 4, 7, 6)
    yield Case(
        "conv2d grouped",
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
        (x, parameter(6, 2, 3, 3), parameter(6)),
    )
    yield Case(
        "conv2d valid", lambda x, w: F.conv2d(x, w, padding="valid"), (x, parameter(6, 4, 3, 2))
    )
    yield Case(
        "conv2d same, even kernel",
        lambda x, w: F.conv2d(x, w, padding="same"),
        (x, parameter(6, 4, 2, 4)),
        fallback=True,
    )
    yield Case(
        "conv2d of tuples",
        lambda x, w: F.conv2d(x, w, None, (2, 1), (0, 1), (1, 2), 1),
        (x, parameter(6, 4, 3, 2)),
    )
    yield Case("conv2d of a constant", F.conv2d, (constant(2, 4, 7, 6), parameter(6, 4, 3, 3)))
    yield Case("conv2d frozen", F.conv2d, (x, constant(6, 4, 3, 3)))
    for name, offset_role in (("", activation), (" by constant offsets", constant)):
        yield Case(
            f"deform_conv2d{name}",
            deform_conv,
            (x, offset_role(2, 8, 3, 3), parameter(6, 4, 2, 2), parameter(6)),
        )
    yield Case(
        "deform_conv2d with a mask",
        lambda x, o, w, m: deform_conv(x, o, w, None, m, stride=1, padding=1),
        (x, activation(2, 8, 8, 7), parameter(6, 4, 2, 2), activation(2, 4, 8, 7)),
    )
    yield Case(
        "deform_conv2d and conv2d",
        lambda x, w, v: deform_conv(x, F.conv2d(x, v, stride=2), w),
        (x, parameter(6, 4, 2, 2), parameter(8, 4, 2, 2)),
    )
    yield Case(
        "conv2d unbatched", F.conv2d, (activation(4, 7, 6), parameter(6, 4, 3, 3)), fallback=True
    )
    yield Case("conv_transpose2d", F.conv_transpose2d, (x, parameter(4, 6, 3, 3)), fallback=True)
    for mode in ("reflect", "circular", "replicate", "zeros"):
        yield of_module(
            f"nn.Conv2d padding_mode={mode}",
            lambda mode=mode: nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode),
            activation(2, 4, 7, 6),
        )


def _products():
    weights = (activation(2, 4, 9), parameter(6, 9), parameter(6), parameter(6))
    yield Case("layer scale", lambda x, w, b, s: F.linear(x, w, b) * s, weights)
    yield Case("layer scale from the left", lambda x, w, b, s: s * F.linear(x, w, b), weights)
    yield Case("layer scale in place", lambda x, w, b, s: F.linear(x, w, b).mul_(s), weights)
    yield Case("layer scale in place, *=", lambda x, w, b, s: _imul(F.linear(x, w, b), s), weights)
    yield Case(
        "layer scale without bias",
        lambda x, w, s: F.linear(x, w) * s,
        (activation(2, 4, 9), parameter(6, 9), parameter(6)),
    )
    yield Case(
        "layer scale of a constant's Linear",
        lambda x, w, b, s: F.linear(x, w, b) * s,
        (constant(2, 4, 9), parameter(6, 9), parameter(6), parameter(6)),
    )
    yield Case(
        "layer scale of a frozen Linear",
        lambda x, w, b, s: F.linear(x, w, b) * s,
        (activation(2, 4, 9), constant(6, 9), constant(6), parameter(6)),
    )
    yield Case("layer scale twice", lambda x, w, b, s: F.linear(x, w, b) * s * s, weights)
    yield Case(
        "layer scale and the product too",
        lambda x, w, b, s: (y := F.linear(x, w, b)) * s + y.tanh(),
        weights,
    )
    yield Case(
        "layer scale after a cast", lambda x, w, b, s: F.linear(x, w, b).view(8, 6) * s, weights
    )
    yield Case("scale not after a Linear", lambda x, s: x * s, (activation(2, 4, 6), parameter(6)))
    yield Case(
        "scale in place, not after a Linear",
        lambda x, s: _imul(x.add(1.0), s),
        (activation(2, 4, 6), parameter(6)),
        fallback=True,
    )
    yield Case("scale in another shape", lambda x, s: x * s, (activation(2, 4, 6), parameter(4, 1)))
    yield Case("mul", torch.mul, (activation(2, 4, 6), activation(2, 4, 6)))
    yield Case("Tensor.mul", lambda x, y: x.mul(y), (activation(2, 4, 6), activation(2, 1, 6)))
    yield Case("mul with itself", lambda x: x * x, (activation(2, 4, 6),))
    yield Case(
        "mul with a scalar tensor", lambda x, y: x * y[0], (activation(2, 4, 6), parameter(1))
    )
    yield Case(
        "mul with a constant",
        lambda x, y: x * y,
        (activation(2, 4, 6), constant(4, 6)),
        fallback=True,
    )
    yield Case("mul with a number", lambda x: 2 * x * 0.5, (activation(2, 4, 6),), fallback=True)
    yield Case(
        "mul by keyword",
        lambda x, y: torch.mul(x, other=y),
        (activation(2, 4, 6), activation(2, 4, 6)),
    )
    yield Case("gate", lambda x, y: x * y.sigmoid(), (activation(2, 4, 6), activation(2, 4, 6)))


def _imul(x, y):
    x *= y
    return x


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


def _joined():
    """Parts with and without a stash, one matmul behind them; norms of a matmul's output."""
    w = parameter(5, 18)
    for name, function in [
        ("cat of activations", lambda x, y, w: F.linear(torch.cat([F.gelu(x), F.silu(y)], -1), w)),
        ("cat by keyword", lambda x, y, w: F.linear(torch.cat((F.gelu(x), y), dim=-1), w)),
        (
            "cat of one stash and a larger part without",
            lambda x, y, w: F.linear(torch.cat([F.gelu(x)[..., :4], y, x[..., 4:]], -1), w),
        ),
        (
            "cat of tokens",
            lambda x, y, w: F.linear(torch.cat([F.gelu(x), F.gelu(y), y[:1]]).repeat(1, 1, 2), w),
        ),
        ("cat used twice", lambda x, y, w: F.linear(_twice(torch.cat([F.gelu(x), y], 2)), w)),
    ]:
        inputs = (activation(3, 4, 9), activation(3, 4, 9), w)
        yield Case(name, function, inputs, eight=0.05, four=0.8)
    inputs = (activation(2, 4, 9), parameter(12, 9), parameter(6))
    for name, norm in [
        ("layer_norm", lambda h, g: F.layer_norm(h, (6,), g)),
        ("rms_norm", lambda h, g: F.rms_norm(h, (6,), g, 1e-6)),
        ("rms_norm over two dims", lambda h, g: F.rms_norm(h, (2, 6), torch.stack([g, g]), 1e-6)),
    ]:
        yield Case(
            f"{name} behind a linear",
            lambda x, w, g, norm=norm: (
                norm(F.linear(x, w).unflatten(-1, (2, 6)), g).transpose(1, 2)
                @ F.gelu(F.linear(x, w)).unflatten(-1, (2, 6)).permute(0, 2, 3, 1)
            ),
            inputs,
            eight=0.06,
            four=1.0,
        )


def _twice(x):
    return x + x.sigmoid() * x


def _fallback():
    x = activation(3, 4, 9)
    for name, function, inputs in [
        ("exp", torch.exp, (x,)),
        ("pow", lambda x: x.pow(3), (x,)),
        ("square", torch.square, (x,)),
        ("sqrt", torch.sqrt, (activation(3, 9, make=positive),)),
        ("div", lambda x, y: x / y, (x, activation(3, 4, 9, make=positive))),
        ("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), (x, x)),
        ("max_pool2d", lambda x: F.max_pool2d(x, 2), (activation(2, 3, 6, 6),)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2), (activation(2, 3, 7, 7),)),
        ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), (activation(2, 3, 7, 7),)),
        ("where", lambda x, y: torch.where(x > y, x * x, y), (x, x)),
        (
            "masked_fill",
            lambda x, m: x.masked_fill(m, -1.0),
            (x, constant(3, 4, 9, make=mask_of, cast=False)),
        ),
        (
            "bilinear",
            F.bilinear,
            (activation(4, 5), activation(4, 6), parameter(3, 5, 6), parameter(3)),
        ),
        ("log_softmax", lambda x: F.log_softmax(x, -1), (x,)),
        ("std", lambda x: x.std(-1), (x,)),
        ("norm", lambda x: torch.linalg.vector_norm(x, dim=-1), (x,)),
        ("sort", lambda x: x.sort(-1)[0], (x,)),
        ("cumprod", lambda x: x.cumprod(-1), (activation(3, 5, make=positive),)),
        ("index", lambda x: x[torch.tensor([0, 2, 2])].square(), (x,)),
        ("cat", lambda x, y: torch.cat([x, y], -1).square(), (x, x)),
        ("pad reflect", lambda x: F.pad(x, (2, 1), mode="reflect").square(), (x,)),
        (
            "interpolate",
            lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
            (activation(2, 3, 4, 4),),
        ),
        ("amax", lambda x: x.amax(-1), (x,)),
        ("max of all", lambda x: x.max() * x.min(), (x,)),
        ("maximum", torch.maximum, (x, x)),
        ("clamp", lambda x: x.clamp(-0.5, 0.5), (x,)),
        ("abs", torch.abs, (x,)),
        ("hardtanh", F.hardtanh, (x,)),
        ("prelu", F.prelu, (x, parameter(4))),
        (
            "views",
            lambda x: x.transpose(0, 1).flip(0).roll(1, 0).flatten(1).unflatten(1, (3, 9)).exp(),
            (x,),
        ),
    ]:
        # Division and the powers magnify what is small.
        loose = {"eight": 0.1, "four": 0.4}
        operators = {"where", "amax", "max of all", "clamp"}
        yield Case(name, function, inputs, fallback=name not in operators, **loose)


CASES = [
    *_linear(),
    *_joined(),
    *_matmul(),
    *_attention(),
    *_softmax(),
    *_norms(),
    *_activations(),
    *_conv(),
    *_products(),
    *_dropout(),
    *_fallback(),
]
assert len({c.name for c in CASES}) == len(CASES)
