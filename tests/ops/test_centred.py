"""Batch and group norm's backward from codes: x_hat has a mean of 0 over the averaged dims, as before it was coded."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch

from mesa_train import Policy, compress


def normalized(kind, x, weight, training=True):
    if kind == "group_norm":
        return F.group_norm(x, 3, weight)
    mean, variance = torch.zeros(6), torch.ones(6)
    return F.batch_norm(x, mean, variance, weight, training=training)


def gradients(kind, policy, training=True):
    seed_torch(0)
    x, weight = torch.randn(4, 6, 7, 7, requires_grad=True), torch.rand(6, requires_grad=True)
    with compress(policy):
        y = normalized(kind, x * 1, weight, training)
    # The same for all elements that are averaged over, as behind a mean over positions: the derivative is 0.
    g = (
        torch.arange(1.0, 7)
        if kind == "batch_norm"
        else torch.arange(3.0).repeat_interleave(2) / weight.detach()
    )
    y.backward(g.view(1, 6, 1, 1).expand_as(y))
    return x.grad, weight.grad


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_a_constant_gradient_gives_none(kind, bits):
    dx, dweight = gradients(kind, Policy(bits=bits, min_bytes=0))
    # Rounding of sums over 196 elements. Not centred, 8 bits leave 5e-3 and 4 bits 0.1.
    assert dx.abs().max() < 1e-5
    if kind == "batch_norm":
        assert dweight.abs().max() < 1e-3


def test_lossless_codes_are_not_touched():
    expected = gradients("batch_norm", Policy(enabled=False))
    found = gradients("batch_norm", Policy(bits=32, min_bytes=0))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_constants_are_not_centred():
    """With running statistics x_hat has the mean that it has."""
    _, expected = gradients("batch_norm", Policy(enabled=False), training=False)
    _, found = gradients("batch_norm", Policy(min_bytes=0), training=False)
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.5)


def test_a_second_backward_is_the_first():
    seed_torch(0)
    x = torch.randn(4, 6, 7, 7, requires_grad=True)
    with compress(Policy(bits=4, min_bytes=0)):
        y = F.batch_norm(x * 1, None, None, training=True).sin().sum()
    first, second = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)
