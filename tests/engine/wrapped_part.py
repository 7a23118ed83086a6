"""A small module, and the assertion that it is as plain when it is wrapped."""

import torch
import torch.nn.functional as F
from torch import nn
from wrap_helpers import EIGHT, close, same
from wrap_helpers import gradients as all_gradients

import mesa_train

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """One functional call and one module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.factor = 2.0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return F.gelu(self.linear(x)) * self.factor * scale


def part():
    torch.manual_seed(0)
    return Part()


def gradients(model, x):
    return [g for g in all_gradients(model, x) if g is not None]


def assert_as_plain(model):
    """The wrapped model computes what it computed, with close gradients; unwrapped, it is what it was."""
    before, expected = dict(vars(model)), gradients(model, X)
    output = model(X)
    types = [type(m) for m in model.modules()]
    mesa_train.wrap(model, EIGHT)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(X), output)
    found = gradients(model, X)
    assert not same(found, expected)  # codes were used
    assert close(found, expected, 0.03)
    mesa_train.unwrap(model)
    assert vars(model) == before
    assert same(gradients(model, X), expected)
    return model
