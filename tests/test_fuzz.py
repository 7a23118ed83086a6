"""Any shape, dtype, stride, policy and operator: the forward is torch's, gradients stay within what the
codes may be off by, and nothing crashes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from mesa_train import Policy, compress

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Largest size of the second derivative, for activations whose input is coded.
CURVATURE = {
    "gelu": (F.gelu, 0.8),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.85),
    "silu": (F.silu, 0.5),
    "softplus": (F.softplus, 0.25),
    "mish": (F.mish, 0.7),
}


@st.composite
def policies(draw):
    return Policy(
        bits=draw(st.sampled_from([8, 4, 2, 32])),
        group_size=draw(st.sampled_from([8, 24, 64, 128])),
        rounding=draw(st.sampled_from(["auto", "nearest", "stochastic"])),
        recompute=draw(st.sampled_from(["none", "cheap", "linear"])),
        min_bytes=draw(st.sampled_from([0, 256])),
    )


@st.composite
def layouts(draw, least=1, most=4):
    """A function that makes a float32 tensor of some shape and strides from a generator."""
    shape = draw(st.lists(st.integers(1, 9), min_size=least, max_size=most))
    shape[-1] = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 130]))
    kind = draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "empty"]))
    order = draw(st.permutations(range(len(shape))))
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    seed = draw(st.integers(0, 2**20))

    def make(dtype):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator) * scale
        if kind == "permuted":
            inverse = sorted(range(len(shape)), key=lambda d: order[d])
            x = x.permute(order).contiguous().permute(inverse)
        elif kind == "sliced":
            x = torch.cat([x, x], -1)[..., : shape[-1]]
        elif kind == "expanded" and len(shape) > 1:
            x = x[:1].expand(shape)
        elif kind == "empty" and len(shape) > 1:
            x = x[:0]
        return x.to(dtype)

    return make


def run(function, leaves, policy=None):
    leaves = [t.detach().requires_grad_() for t in leaves]
    inputs = [t.view_as(t) for t in leaves]  # activations, not parameters
    if policy is None:
        output = function(*inputs)
    else:
        with compress(policy):
            output = function(*inputs)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return output, grad, torch.autograd.grad(output, leaves, grad, allow_unused=True)


def code_error(x, policy, nearest, dtype_slack):
    """The most that a decoded element may be off by, per row: half a step or a step of the widest group
    (scale and zero are bfloat16, rounded outwards), and rounding to the tensor's dtype."""
    if policy.bits == 32 or x.shape[-1] == 1 or x.numel() * x.element_size() < policy.min_bytes:
        return dtype_slack * x.abs().amax(-1, keepdim=True)
    wide = x.double()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs())
    step = (high - low + largest * 2.0**-7) / (2**policy.bits - 1) * (1 + 2.0**-7)
    return step * (0.5 if nearest else 1.0) * 1.01 + dtype_slack * largest


def rounds_to_nearest(policy, nonlinear):
    if policy.rounding == "auto":
        return policy.bits == 8 or nonlinear
    return policy.rounding == "nearest"


SETTINGS = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


@SETTINGS
@hypothesis.given(layouts(), policies(), st.sampled_from(DTYPES), st.integers(1, 5), st.booleans())
def test_linear(make, policy, dtype, features, biased):
    x = make(dtype)
    weight = torch.randn(features, x.shape[-1]).to(dtype)
    leaves = [x, weight, torch.randn(features).to(dtype)][: 2 + biased]
    expected, grad, (dx, dweight, *_) = run(F.linear, leaves)
    found, _, (found_dx, found_dweight, *_) = run(F.linear, leaves, policy)
    assert torch.equal(found, expected)
    slack = 8 * torch.finfo(dtype).eps
    size = grad.abs().double() @ weight.abs().double()
    assert ((found_dx - dx).abs().double() <= slack * size + 1e-30).all()
    error = code_error(x, policy, rounds_to_nearest(policy, False), slack)
    rows = grad.abs().double().reshape(-1, features)
    bound = rows.t() @ error.expand(x.shape).double().reshape(-1, x.shape[-1])
    terms = rows.t() @ x.abs().double().reshape(-1, x.shape[-1])
    assert ((found_dweight - dweight).abs().double() <= bound + slack * terms + 1e-30).all()


@pytest.mark.parametrize("name", CURVATURE)
@SETTINGS
@hypothesis.given(layouts(), policies(), st.sampled_from(DTYPES))
def test_activations(name, make, policy, dtype):
    function, curvature = CURVATURE[name]
    x = make(dtype)
    expected, grad, (dx,) = run(function, [x])
    found, _, (found_dx,) = run(function, [x], policy)
    assert torch.equal(found, expected)
    slack = 16 * torch.finfo(dtype).eps
    # A group may span what the strides make neighbours, so the bound is that of the whole tensor.
    error = code_error(x.reshape(1, -1), policy, rounds_to_nearest(policy, True), slack)
    bound = grad.abs().double() * (curvature * (error.reshape(()) if x.numel() else 0) + 2 * slack)
    assert ((found_dx - dx).abs().double() <= bound + 1e-30).all()


OTHERS = {
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "amax": lambda x: x.amax(-1),
    "gate": lambda x: x * x.sigmoid(),
    "chain": lambda x: F.gelu(F.layer_norm(x, x.shape[-1:])).transpose(0, -1) * 2,
    "matmul": lambda x: x @ x.mT if x.dim() > 1 else x * x,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x) if x.dim() > 2 else x.exp(),
    "exp": torch.exp,
    "dropout": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.parametrize("name", OTHERS)
@SETTINGS
@hypothesis.given(layouts(), policies(), st.sampled_from(DTYPES))
def test_other_operators(name, make, policy, dtype):
    function, x = OTHERS[name], make(dtype)
    torch.manual_seed(0)
    expected, _, (dx,) = run(function, [x])
    torch.manual_seed(0)
    found, _, (found_dx,) = run(function, [x], policy)
    assert torch.equal(found, expected) or (found.isnan() == expected.isnan()).all()
    assert found_dx.shape == dx.shape
    assert found_dx.dtype is dx.dtype
    assert (found_dx.isfinite() | ~dx.isfinite()).all()
    if policy.bits == 32 and dtype in (torch.float32, torch.float64):
        # A norm of nearly equal elements magnifies rounding: by 1 / sqrt(eps) at most.
        size = dx.abs().double().amax() + 1 if dx.numel() else 1.0
        assert ((found_dx - dx).abs().double() <= 1e4 * torch.finfo(dtype).eps * size).all()
