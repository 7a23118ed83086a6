"""forward="fused": norms, activations and softmax computed in the pass that makes their codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn

import mesa_train
from mesa_train import Policy, compress

EXACT = Policy(min_bytes=0)
FUSED = Policy(min_bytes=0, forward="fused")

FUSED_OPERATORS = tuple(f"mesa_train::{n}_encode" for n in ("norm", "activation", "softmax"))

FUNCTIONS = {
    "layer_norm": lambda x: F.layer_norm(x, (24,), torch.linspace(1, 2, 24), torch.ones(24)),
    "layer_norm over two dims": lambda x: F.layer_norm(x, (7, 24)),
    "rms_norm": lambda x: F.rms_norm(x, (24,), torch.linspace(1, 2, 24)),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "gelu of strided input": lambda x: F.gelu(x.transpose(0, 1)),
    "softmax": lambda x: x.softmax(-1),
    "softmax to another dtype": lambda x: F.softmax(x, -1, dtype=torch.bfloat16),
    "softmax over another dim": lambda x: x.softmax(1),
}


def run(function, policy, x):
    x = x.clone().requires_grad_()
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with compress(policy), Names():
        y = function(x * 1)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    return y, grad, any(n.startswith(FUSED_OPERATORS) for n in names)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_output_and_gradient_are_the_exact_ones_to_rounding(name):
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0)) * 2
    expected, gradient, fused = run(FUNCTIONS[name], EXACT, x)
    assert not fused
    y, grad, fused = run(FUNCTIONS[name], FUSED, x)
    assert fused == (name != "softmax over another dim")
    assert y.dtype == expected.dtype
    assert y.stride() == expected.stride()
    # Rounding of the sums, and of bfloat16 where that is the output; a code may fall one step aside.
    eps = max(torch.finfo(y.dtype).eps, 1e-5)
    torch.testing.assert_close(y, expected, rtol=eps, atol=eps)
    assert (grad - gradient).norm() <= (0.01 + 2 * eps) * gradient.norm()


def test_float64_stays_pytorchs_own():
    x = torch.randn(5, 24, dtype=torch.float64)
    for function in (F.gelu, lambda t: F.layer_norm(t, (24,)), lambda t: t.softmax(-1)):
        assert torch.equal(run(function, FUSED, x)[0], run(function, EXACT, x)[0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(32), nn.Linear(32, 96)
        self.proj, self.norm2 = nn.Linear(32, 32), nn.RMSNorm(32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj((q @ k.mT / 6).softmax(-1) @ v)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize("recompute", ["none", "cheap", "linear"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_keeps_the_same_bytes(recompute, autocast):
    seed_torch(0)
    model, x = Block(), torch.randn(4, 16, 32)
    results = []
    for forward in ("exact", "fused"):
        policy = Policy(min_bytes=0, recompute=recompute, forward=forward)
        wrapped = mesa_train.wrap(copy.deepcopy(model), policy)
        dtype = torch.bfloat16 if autocast else None
        kept = mesa_train.footprint(wrapped, x, autocast=dtype).saved_bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = wrapped(x).float().square().mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in wrapped.parameters()])
        results.append((kept, loss.detach(), gradient))
    (kept, loss, gradient), (fused_kept, fused_loss, fused_gradient) = results
    assert fused_kept == kept
    torch.testing.assert_close(fused_loss, loss, rtol=1e-2 if autocast else 1e-5, atol=0)
    # A code one step aside is as far as 8 bits are from the exact gradient.
    assert (fused_gradient - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.slow
def test_a_fused_model_compiles_whole():
    seed_torch(0)
    torch._dynamo.reset()
    model, x = mesa_train.wrap(Block(), FUSED), torch.randn(4, 16, 32)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    torch._dynamo.reset()
