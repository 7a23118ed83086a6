"""An activation's gradient that the Linear behind it makes in the same pass over the codes."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from mesa_train import compress, wrap
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.policy import Policy
from mesa_train.stash.backward_cache import backward_cache

EIGHT = Policy(min_bytes=0)


class Calls(TorchDispatchMode):
    """How often the backward ran each of some operators."""

    def __init__(self, *names):
        super().__init__()
        self.counts = dict.fromkeys(names, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counting(monkeypatch, *names):
    """Counts of the operators that every following `Tensor.backward` runs."""
    mode, backward = Calls(*names), torch.Tensor.backward

    def counted(*args, **kwargs):
        # Under `compress`, the call comes back here through the mode.
        nested = mode in _get_current_dispatch_mode_stack()
        with contextlib.nullcontext() if nested else mode:
            return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    return mode.counts


@pytest.fixture(params=["native", "python"])
def calls(request, monkeypatch):
    """The counts of the backwards, with native rows and with Python rows."""
    with contextlib.ExitStack() as stack:
        if request.param == "python":
            stack.enter_context(native.python_rows(CompressionMode))
        yield counting(monkeypatch, "activation_pair", "activation_backward")


def mlp(*between):
    seed_torch(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), *between, nn.Linear(32, 8))


def gradients(model, x, loss=None):
    x = x.clone().requires_grad_()
    output = model(x)
    (loss or (lambda y: y.square().sum()))(output).backward()
    found = [x.grad, *[p.grad for p in model.parameters()]]
    for p in model.parameters():
        p.grad = None
    return found


def close(found, expected, tolerance=0.02):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_serves_both(calls, dtype):
    model, x = mlp().to(dtype), torch.randn(4, 5, 8, dtype=dtype)
    expected = gradients(model, x)
    wrap(model, EIGHT)
    close(gradients(model, x), expected)
    assert calls == {"activation_pair": 1, "activation_backward": 0}
    assert not backward_cache.gradients


def test_layer_scale_behind(calls):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.scale = mlp(), nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.mlp(x) * self.scale

    model, x = Scaled(), torch.randn(4, 5, 8)
    expected = gradients(model, x)
    wrap(model, EIGHT)
    close(gradients(model, x), expected)
    assert calls == {"activation_pair": 1, "activation_backward": 0}


def test_a_second_user_of_the_activation(calls):
    """The gradient that reaches the activation is a sum, so what was prepared is not it."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            seed_torch(0)
            self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            hidden = F.gelu(self.one(x))
            return self.two(hidden) + self.three(hidden)

    model, x = Both(), torch.randn(6, 8)
    expected = gradients(model, x)
    wrap(model, EIGHT)
    close(gradients(model, x), expected)
    assert calls["activation_backward"] == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_that_changes_the_gradient(calls, inplace):
    x = torch.randn(6, 8)

    def run(policy):
        model = mlp()
        with compress(policy):
            hidden = model[1](model[0](x))
            hidden.register_hook(lambda g: g.mul_(3) if inplace else g * 3)
            model[2](hidden).square().sum().backward()
        return [p.grad for p in model.parameters()]

    close(run(EIGHT), run(Policy(enabled=False)))
    assert calls["activation_backward"] == 1


def test_a_frozen_linear_prepares_nothing(calls):
    model, x = mlp(), torch.randn(6, 8)
    for p in model[2].parameters():
        p.requires_grad_(False)
    wrap(model, EIGHT)
    model(x).square().sum().backward()
    assert calls == {"activation_pair": 0, "activation_backward": 1}


def test_two_backwards_of_one_graph(calls):
    model, x = mlp(), torch.randn(6, 8)
    wrap(model, EIGHT)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not backward_cache.gradients


@pytest.fixture
def summed(monkeypatch):
    """As on a GPU: the pass over the codes adds the gradient up; how many of the sums were taken."""
    from mesa_train.ops import activation

    taken: list[bool] = []
    take = type(backward_cache).take_sum

    def counted(self, grad):
        found = take(self, grad)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(activation, "_sums", lambda layout, grad: True)
    monkeypatch.setattr(type(backward_cache), "take_sum", counted)
    with native.python_rows(CompressionMode):
        yield taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_in_front_gets_its_gradient_from_the_same_pass(summed, dtype):
    model, x = mlp().to(dtype), torch.randn(4, 5, 8, dtype=dtype)
    expected = gradients(model, x)
    wrap(model, EIGHT)
    close(gradients(model, x), expected)
    assert summed == [False, True]  # the second Linear's own gradient has no such maker
    assert not backward_cache.sums


@pytest.mark.parametrize("rows", ["native", "python"])
def test_native_nodes_sum_in_the_same_pass_off_the_cpu(monkeypatch, rows):
    """On the meta device, as on a GPU: one sum is left, of the last Linear's own gradient."""
    python = rows == "python"
    with native.python_rows(CompressionMode) if python else contextlib.nullcontext():
        model = wrap(mlp().to("meta"), EIGHT)
        loss = model(torch.empty(4, 5, 8, device="meta", requires_grad=True)).square().mean()
        counts = counting(monkeypatch, "activation_pair_sum", "sum")
        loss.backward()
    assert counts == {"activation_pair_sum": 1, "sum": 1}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_in_front_that_changes_the_gradient(summed, inplace):
    x = torch.randn(6, 8)

    def run(policy):
        model = mlp()
        with compress(policy):
            hidden = model[0](x)
            hidden.register_hook(lambda g: g.mul_(3) if inplace else g * 3)
            model[2](model[1](hidden)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    close(run(EIGHT), run(Policy(enabled=False)))
    assert summed == [False, False]
    assert not backward_cache.sums


def test_a_gradient_is_not_held_for_its_sum(summed):
    """Without a Linear in front nobody takes the sum; the gradient must not wait for one."""

    class Before(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append(sys.getrefcount(grad))
            return grad

    alive = []
    x = torch.randn(6, 32, requires_grad=True)
    model = nn.Sequential(nn.GELU(), nn.Linear(32, 8))
    for policy in (Policy(enabled=False), EIGHT):
        with compress(policy):
            model(Before.apply(x)).sum().backward()
    assert alive[0] == alive[1]
