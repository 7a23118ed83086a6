"""Other ways to differentiate than one backward: right or an error, never silently wrong."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.autograd import functional

import mesa_train
from mesa_train import Policy

POLICIES = {
    "lossless": Policy(bits=32, min_bytes=0),
    "mesa8": Policy(min_bytes=0),
    "mesa8-recompute": Policy(min_bytes=0, recompute="linear"),
    "fused": Policy(min_bytes=0, forward="fused"),
}
PRESETS = pytest.mark.parametrize("preset", POLICIES)


@pytest.fixture
def plain():
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def x():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def close(found, expected, preset):
    # 8 bits on tensors as small as these: up to 1 %.
    bound = 1e-5 if preset == "lossless" else 0.03
    return (found - expected).norm() <= bound * expected.norm()


@PRESETS
def test_forward_mode_passes_through(plain, preset):
    model = mesa_train.wrap(copy.deepcopy(plain), POLICIES[preset])
    tangents = []
    for module in (plain, model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x(), torch.ones(6, 16))
            tangents.append(forward_ad.unpack_dual(module(dual)).tangent)
    assert torch.equal(*tangents)


@PRESETS
def test_the_double_backward_trick_is_an_error(plain, preset):
    """It differentiates a backward by the gradient that came in; nothing found there would be zeros."""
    model = mesa_train.wrap(copy.deepcopy(plain), POLICIES[preset])
    assert functional.jvp(plain, x(), torch.ones(6, 16))[1].norm() > 0
    with pytest.raises(RuntimeError, match="second derivative through"):
        functional.jvp(model, x(), torch.ones(6, 16))


@PRESETS
def test_batched_gradients(plain, preset):
    """Many backwards at once, by vmap."""
    model = mesa_train.wrap(copy.deepcopy(plain), POLICIES[preset])
    found, expected = [
        functional.jacobian(lambda t, m=m: m(t).sum(0), x(), vectorize=True) for m in (model, plain)
    ]
    assert close(found, expected, preset)
    for module in (model, plain):
        output = module(x()).sum(0)
        batched = torch.autograd.grad(
            output, list(module.parameters()), torch.eye(4), is_grads_batched=True
        )
        module.batched = torch.cat([t.flatten() for t in batched])
    assert close(model.batched, plain.batched, preset)


@PRESETS
def test_saliency_of_a_frozen_model(plain, preset):
    gradients = []
    for module in (plain, mesa_train.wrap(copy.deepcopy(plain), POLICIES[preset])):
        module.eval().requires_grad_(False)
        image = x().requires_grad_()
        module(image)[:, 0].sum().backward()
        gradients.append(image.grad)
    assert close(gradients[1], gradients[0], preset)


@PRESETS
def test_weights_that_change_between_forward_and_backward_are_an_error(plain, preset):
    model = mesa_train.wrap(plain, POLICIES[preset])
    for layer in (model[0], model[3]):
        loss = model(x()).square().mean()
        with torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@PRESETS
def test_unwrapped_or_wrapped_again_between_forward_and_backward(plain, preset):
    for change in (mesa_train.unwrap, lambda m: mesa_train.wrap(m, "lossless")):
        gradients = []
        for module in (copy.deepcopy(plain), copy.deepcopy(plain)):
            if gradients:
                mesa_train.wrap(module, POLICIES[preset])
            loss = module(x()).square().mean()
            if gradients:
                change(module)
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        assert close(gradients[1], gradients[0], preset)
