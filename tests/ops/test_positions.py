"""Tables of positions that a model computes in each layer: rebuilt from positions and frequencies."""

import copy

import pytest
import torch
from seeding import seed_torch
from stash_helpers import implementation
from torch import nn

from mesa_train import Policy, footprint, wrap
from mesa_train.engine.wrap import report_of

HEADS, TOKENS, WIDTH = 4, 32, 24
EXACT = Policy(bits=32, min_bytes=0)
CODES = Policy(min_bytes=0)


def rotated(x, positions):
    """As V-JEPA 2: the tables anew in each call."""
    omega = 1.0 / 100 ** (torch.arange(WIDTH // 2) / (WIDTH / 2))
    angle = positions.unsqueeze(-1) * omega
    sin, cos = angle.sin().repeat(1, 1, 1, 2), torch.cos(angle).repeat(1, 1, 1, 2)
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-right, left), -1).flatten(-2)
    return x * cos + turned * sin


class Rotary(nn.Module):
    """Queries and keys in two layers, with the positions of each image and head."""

    def __init__(self, depth=2, rotate=rotated, after=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(depth))
        self.rotate, self.after = rotate, after

    def forward(self, x, positions):
        for layer in self.layers:
            q, k = layer(x).chunk(2, -1)
            x = (self.rotate(q, positions) + self.rotate(k, positions)).tanh()
            if self.after is not None:
                self.after(positions)
        return x


def inputs(batch=3):
    seed_torch(1)
    positions = torch.randint(0, 99, (batch, 1, TOKENS)).repeat(1, HEADS, 1)
    return torch.randn(batch, HEADS, TOKENS, WIDTH), positions


@pytest.fixture(params=["native", "python"], autouse=True)
def rows(request):
    yield from implementation(request.param)


def step(model, policy):
    model = copy.deepcopy(model)
    if policy is not None:
        wrap(model, policy)
    x, positions = inputs()
    output = model(x.requires_grad_(), positions)
    output.square().sum().backward()
    return output.detach(), [x.grad, *[p.grad for p in model.parameters()]], model


def shifted(positions):
    positions.add_(1)


@pytest.mark.parametrize("after", [None, shifted], ids=["kept", "written to"])
def test_gradients_are_plains_bit_for_bit(after):
    """Also if the positions change between the layers."""
    seed_torch(0)
    model = Rotary(after=after)
    expected, found = step(model, None), step(model, EXACT)
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))
    rebuilt = [k for k in report_of(found[2]).rows if k[1:] == ("mul", "right", "rebuilt")]
    assert rebuilt


def test_no_layer_keeps_a_table():
    """Each product kept a table as large as its other factor, four for each layer."""
    sizes = {}
    for policy in ("plain", CODES):
        saved = [
            footprint(Rotary(depth), inputs(), policy=policy).by_operator.get("mul", 0)
            for depth in (1, 2)
        ]
        sizes[policy == "plain"] = saved[1] - saved[0]
    x, _ = inputs()
    assert sizes[True] == 4 * x.numel() * 4
    # All layers share a copy of the positions. Each product of angles has its own frequencies.
    assert sizes[False] == 2 * (WIDTH // 2) * 4


def test_other_constants_and_tracked_tables_are_left_to_pytorch():
    def scaled(x, positions):
        angle = positions.unsqueeze(-1) * torch.rand(WIDTH)
        return x * angle.sqrt() + x * angle.requires_grad_().sin()

    seed_torch(0)
    model = Rotary(1, scaled)
    seed_torch(2)
    expected = step(model, None)
    seed_torch(2)
    found = step(model, EXACT)
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))


def test_a_policy_that_rebuilds_nothing_keeps_the_tables():
    model, given = Rotary(1), inputs()
    plain = footprint(model, given, policy="plain").by_operator["mul"]
    none = footprint(model, given, policy=Policy(min_bytes=0, recompute="none"))
    assert none.by_operator["mul"] >= plain
