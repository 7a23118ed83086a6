"""Any shape, dtype, stride, policy and operator: the forward is torch's, gradients stay within what the
codes may be off by, and nothing crashes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from mesa_train import Policy, compress

# Below any element here but zero: where all terms are, rounding is all there is.
TINY = 1e-6

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
    """A float32 tensor of some size, and a view that gives it its final shape and strides."""
    shape = draw(st.lists(st.integers(1, 9), min_size=least, max_size=most))
    shape[-1] = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 130]))
    kind = draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "empty"]))
    order = draw(st.permutations(range(len(shape))))
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    wide = [*shape[:-1], 2 * shape[-1]] if kind == "sliced" else shape
    x = torch.randn(wide, generator=generator) * scale

    def view(t):
        if kind == "permuted":
            # Contiguous in another order of the dims.
            inverse = sorted(range(len(shape)), key=lambda d: order[d])
            return t.permute(order).contiguous().permute(inverse)
        if kind == "sliced":
            return t[..., : shape[-1]]
        if kind == "expanded" and len(shape) > 1:
            return t[:1].expand(shape)
        return t[:0] if kind == "empty" and len(shape) > 1 else t

    return x, view


def run(function, layout, dtype, weights=(), policy=None):
    """(input, output, its gradient, gradients of the input and the weights) at activations: results of
    something, not leaves, which are kept as they are."""
    tensor, view = layout
    leaf = tensor.to(dtype).requires_grad_()
    x = view(leaf * 1.0)
    x.retain_grad()
    weights = [w.detach().requires_grad_() for w in weights]
    if policy is None:
        output = function(x, *weights)
    else:
        with compress(policy):
            output = function(x, *weights)
    grad = normal(output.shape, 5, output.dtype)
    return x, output, grad, torch.autograd.grad(output, [x, *weights], grad, allow_unused=True)


def normal(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def code_error(x, policy, nearest, dtype_slack):
    """The most that a decoded element may be off by, per row: half a step or a step of the widest group
    (scale and zero are bfloat16, rounded outwards), and rounding to the tensor's dtype."""
    wide = x.detach().double()
    if policy.bits == 32 or x.shape[-1] == 1 or x.numel() * x.element_size() < policy.min_bytes:
        return dtype_slack * wide.abs().amax(-1, keepdim=True)
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
def test_linear(layout, policy, dtype, features, biased):
    width = layout[1](layout[0]).shape[-1]
    weights = [normal((features, width), 1, dtype), normal(features, 2, dtype)][: 1 + biased]
    x, expected, grad, (dx, dweight, *_) = run(F.linear, layout, dtype, weights)
    _, found, _, (found_dx, found_dweight, *_) = run(F.linear, layout, dtype, weights, policy)
    assert torch.equal(found, expected)
    slack = 8 * torch.finfo(dtype).eps
    size = grad.abs().double() @ weights[0].abs().double()
    assert ((found_dx - dx).abs().double() <= slack * size + TINY).all()
    # A group spans what the strides make neighbours: a token's elements, if those are.
    within = x if x.is_contiguous() else x.reshape(1, -1)
    error = code_error(within, policy, rounds_to_nearest(policy, False), slack)
    error = error if x.is_contiguous() else error.reshape(()) if x.numel() else error.new_zeros(())
    rows = grad.abs().double().reshape(-1, features)
    bound = rows.t() @ error.expand(x.shape).reshape(-1, width)
    terms = rows.t() @ x.detach().abs().double().reshape(-1, width)
    assert ((found_dweight - dweight).abs().double() <= bound + slack * terms + TINY).all()


@pytest.mark.parametrize("name", CURVATURE)
@SETTINGS
@hypothesis.given(layouts(), policies(), st.sampled_from(DTYPES))
def test_activations(name, layout, policy, dtype):
    function, curvature = CURVATURE[name]
    x, expected, grad, (dx,) = run(function, layout, dtype)
    _, found, _, (found_dx,) = run(function, layout, dtype, policy=policy)
    assert torch.equal(found, expected)
    if not x.numel():
        return
    slack = 16 * torch.finfo(dtype).eps
    # A group spans what the strides make neighbours, so the bound is that of the whole tensor.
    error = code_error(x.reshape(1, -1), policy, rounds_to_nearest(policy, True), slack)
    bound = grad.abs().double() * (curvature * error.reshape(()) + 2 * slack)
    assert ((found_dx - dx).abs().double() <= bound + TINY).all()


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
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x) if x.dim() > 2 else x.sin(),
    "exp": lambda x: (x * 0.05).exp(),
    "dropout": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@SETTINGS
@hypothesis.given(layouts(), policies(), st.sampled_from(DTYPES))
def test_other_operators(name, layout, policy, dtype):
    torch.manual_seed(0)
    if name == "amax" and not layout[1](layout[0]).numel():
        return
    _, expected, _, (dx,) = run(OTHERS[name], layout, dtype)
    torch.manual_seed(0)
    _, found, _, (found_dx,) = run(OTHERS[name], layout, dtype, policy=policy)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found_dx.shape == dx.shape
    assert found_dx.dtype is dx.dtype
    assert (found_dx.isfinite() | ~dx.isfinite()).all()
    if policy.bits == 32 and dtype in (torch.float32, torch.float64) and dx.numel():
        # A norm of nearly equal elements magnifies rounding: by 1 / sqrt(eps) at most.
        size = dx.abs().double().amax() + 1
        assert ((found_dx - dx).abs().double() <= 1e4 * torch.finfo(dtype).eps * size).all()
