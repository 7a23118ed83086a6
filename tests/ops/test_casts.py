"""Casts between what is coded and what reads it: the backward sees the rounding, and the overflow, of the forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn

from mesa_train import Policy, compress, wrap

half, brain, single = torch.float16, torch.bfloat16, torch.float32
LOSSLESS = Policy(bits=32, min_bytes=0)
EIGHT = Policy(min_bytes=0)

# What makes a tensor that is rebuilt from others.
MADE = {
    "layer_norm": lambda a: F.layer_norm(a, (64,), torch.linspace(1, 2, 64).to(a.dtype)),
    "rms_norm": lambda a: F.rms_norm(a, (64,)),
    "batch_norm": lambda a: F.batch_norm(a, None, None, training=True),
    "group_norm": lambda a: F.group_norm(a, 4, torch.linspace(1, 2, 64).to(a.dtype)),
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "glu": lambda a: F.glu(torch.cat([a, a], -1)),
    "product": lambda a: a * a.flip(0),
    "times a number": lambda a: F.gelu(a) * 0.3,
    "dropout": lambda a: F.dropout(F.gelu(a), 0.3),
    "view": lambda a: F.gelu(a).view(8, 8, 64).transpose(0, 1).reshape(64, 64),
    "cat": lambda a: torch.cat([F.gelu(a), F.silu(a)])[:64],
    "softmax": lambda a: a.softmax(-1),
    "sigmoid": torch.sigmoid,
    "linear": lambda a: F.linear(F.gelu(a), torch.eye(64, dtype=a.dtype).requires_grad_()),
}
CHAINS = {
    "bfloat16, float32": lambda t: t.bfloat16().float(),
    "float16, float32": lambda t: t.half().float(),
    "float16, bfloat16, float32": lambda t: t.half().bfloat16().float(),
    "bfloat16, float16, float64, float32": lambda t: t.bfloat16().half().double().float(),
    "float64, float32": lambda t: t.double().float(),
    "bfloat16, moved": lambda t: t.bfloat16().view(2, 32, 64).flip(0).flatten(0, 1).float(),
    "float8_e4m3fn, float32": lambda t: t.to(torch.float8_e4m3fn).float(),
    "float8_e5m2, bfloat16, float32": lambda t: t.to(torch.float8_e5m2).bfloat16().float(),
    "type_as": lambda t: t.type_as(torch.empty(0, dtype=brain)).float(),
    "memory format": lambda t: t.to(brain, memory_format=torch.contiguous_format).float(),
    "copied": lambda t: torch.empty_like(t, dtype=brain).copy_(t).float(),
}


def weight_gradient(make, chain, policy, dtype=single, autocast=None):
    seed_torch(0)
    weight = torch.randn(8, 64, requires_grad=True)
    x = torch.randn(64, 64, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", autocast or brain, enabled=autocast is not None):
        if policy is None:
            y = F.linear(chain(make(x * 1)), weight)
        else:
            with compress(policy):
                y = F.linear(chain(make(x * 1)), weight)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return weight.grad


@pytest.mark.parametrize("recompute", ["cheap", "linear"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("made", MADE)
def test_the_decoded_value_is_rounded_as_the_forward_was(made, chain, recompute):
    policy = Policy(bits=32, min_bytes=0, recompute=recompute)
    expected = weight_gradient(MADE[made], CHAINS[chain], None)
    found = weight_gradient(MADE[made], CHAINS[chain], policy)
    # A skipped rounding of all values moves the gradient by 1e-3 (bfloat16) or 1e-4 (float16). Rebuilt in float32,
    # a value or two of the 4,096 may fall on the other side of a step: of float8, that is 2 % of the value.
    bound = 1e-3 if "float8" in chain else 5e-5
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("dtype", [half, brain])
@pytest.mark.parametrize("made", MADE)
def test_a_tensor_of_half_precision_is_widened_after_its_rounding(made, dtype):
    expected = weight_gradient(MADE[made], torch.Tensor.float, None, dtype)
    found = weight_gradient(MADE[made], torch.Tensor.float, LOSSLESS, dtype)
    # As above. The CPU's layer and group norm answer statistics in half precision, so their x_hat is that
    # much off, in PyTorch's own backward too: at most half a step of the dtype.
    bound = torch.finfo(dtype).eps / 2 if made in ("layer_norm", "group_norm") else 5e-5
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("made", MADE)
def test_autocast_narrows_what_was_computed_in_float32(made):
    expected = weight_gradient(MADE[made], lambda t: t, None, autocast=brain)
    found = weight_gradient(MADE[made], lambda t: t, LOSSLESS, autocast=brain)
    # The gradient itself is rounded to bfloat16: few of its elements differ, by a step. An activation of the
    # narrowed input, instead of the narrowed activation, is 2e-3 off.
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("policy", [LOSSLESS, EIGHT, Policy(bits=4, min_bytes=0)], ids=str)
@pytest.mark.parametrize("chain", ["half", "half, double", "half, bfloat16", "half, moved"])
def test_an_overflow_of_float16_shows_in_the_gradient(policy, chain):
    """A GradScaler has to see it: 1e5 is beyond float16."""
    weight = torch.randn(8, 64, requires_grad=True)
    x = torch.randn(64, 64, requires_grad=True)
    then = {
        "half": lambda t: t.half().float(),
        "half, double": lambda t: t.half().double().float(),
        "half, bfloat16": lambda t: t.half().bfloat16().float(),
        "half, moved": lambda t: t.to(half).view(8, 8, 64).float().flatten(0, 1),
    }[chain]
    with compress(policy):
        y = F.linear(then(F.layer_norm(x * 1, (64,), torch.full((64,), 1e5))), weight)
    y.sum().backward()
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm", "group_norm"])
@pytest.mark.parametrize("forward", ["exact", "fused"])
def test_an_overflow_in_a_norms_own_float16_output(norm, forward):
    weight = torch.randn(8, 64, dtype=half, requires_grad=True)
    x = (torch.randn(64, 64) * 3).to(half).requires_grad_()
    large = torch.full((64,), 6e4, dtype=half)
    norms = {
        "layer_norm": lambda t: F.layer_norm(t, (64,), large),
        "rms_norm": lambda t: F.rms_norm(t, (64,), large),
        "batch_norm": lambda t: F.batch_norm(t, None, None, large, training=True),
        "group_norm": lambda t: F.group_norm(t, 4, large),
    }
    with compress(Policy(min_bytes=0, forward=forward)):
        y = F.linear(norms[norm](x * 1).float(), weight.float())
    assert not y.isfinite().all()
    y.backward(torch.ones_like(y))
    assert not weight.grad.isfinite().all()


def test_float8_saturates_as_in_the_forward():
    # e4m3fn ends at 448.
    made = lambda a: F.layer_norm(a, (64,), torch.full((64,), 1e3))  # noqa: E731
    chain = lambda t: t.to(torch.float8_e4m3fn).float()  # noqa: E731
    expected, found = [weight_gradient(made, chain, p) for p in (None, LOSSLESS)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1.0, equal_nan=True)


class Narrowed(nn.Module):
    """A block whose norm and activation pass through bfloat16 between float32 Linears."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        hidden = self.first(self.norm(x).bfloat16().float())
        return x + self.second(F.gelu(hidden).to(brain).to(single))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lossless", "mesa8", "mesa8-recompute"])
def test_a_compiled_model_rounds_alike(policy):
    torch._dynamo.reset()
    model, x = wrap(Narrowed(), Policy.of(policy)), torch.randn(4, 16, 32)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (model, compiled):
        module(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    eager, traced = gradients
    assert (eager - traced).norm() < 1e-4 * eager.norm()
    torch._dynamo.reset()


def test_bits_that_are_read_as_another_dtype_have_no_stash():
    x = torch.randn(4, 64, requires_grad=True)
    with compress(EIGHT) as mode:
        y = F.gelu(x * 1)
        assert mode.recorder.lineage.get(y) is not None
        assert mode.recorder.lineage.get(y.view(brain)) is None
