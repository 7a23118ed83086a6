"""What a case of an operator's call is, and how one is run.

A case is a function of tensors and what each tensor is: an activation (it needs a gradient and is no leaf, so that it
is coded), a parameter (a leaf that needs a gradient) or a constant.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from seeding import seed_torch
from torch import nn
from torch.func import functional_call

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
    seed_torch(seed)
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
    seed_torch(1)
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
    seed_torch(0)
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
