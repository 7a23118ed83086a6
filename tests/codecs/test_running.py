"""The paper's running ranges: they move once a step, they saturate, and they leave no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train.codecs.running import Running
from mesa_train.engine.bound import entry_of

ROWS, COLS = 64, 128
# Mesa's paper, section 3.2; written here, so that a change of the source is noticed.
DECAY = 0.9


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(COLS, COLS),
            nn.LayerNorm(COLS),
            nn.Linear(COLS, 8),
        )

    def forward(self, x):
        return self.last(F.gelu(self.norm(self.first(x))))


@pytest.fixture
def model():
    seed_torch(0)
    return mesa_train.wrap(Net(), "paper")


def ranges(model):
    """By module, operator, operand and use: (minimum, range, step) of each group."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if (entry := entry_of(module)) is not None
        for key, value in entry.context.ranges.items()
    }


def batch(scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(ROWS, COLS, generator=generator)


def step(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(1e-3 * p.grad)


def test_the_averages_are_the_papers(model):
    x, y = batch(), batch(2.0, seed=2)
    step(model, x)
    low, span, _ = ranges(model)["first.linear.input.0"]
    pooled = x.view(ROWS, 2, 64)
    torch.testing.assert_close(low, pooled.amin((0, 2)))
    torch.testing.assert_close(span, pooled.amax((0, 2)) - pooled.amin((0, 2)))
    step(model, y)
    moved = ranges(model)["first.linear.input.0"]
    other = y.view(ROWS, 2, 64)
    torch.testing.assert_close(moved[0], DECAY * low + (1 - DECAY) * other.amin((0, 2)))
    torch.testing.assert_close(
        moved[1], DECAY * span + (1 - DECAY) * (other.amax((0, 2)) - other.amin((0, 2)))
    )


def test_values_beyond_the_lagging_range_saturate(model):
    step(model, batch())
    codec = Running(entry_of(model.first).context.ranges, "linear.input.0", step=2, group_size=64)
    x = 2 * batch()
    decoded = codec.decode(codec.encode(x), COLS, torch.float32)
    low, span, _ = ranges(model)["first.linear.input.0"]
    low, high = low.repeat_interleave(64), (low + span).repeat_interleave(64)
    # Wrapping codes would turn the largest into the smallest.
    inside = torch.maximum(torch.minimum(x, high), low)
    assert ((decoded - inside).abs() <= span.max() / 255 + 1e-5).all()
    assert (x > high).any()
    assert (x < low).any()


def test_ranges_move_once_per_optimisation_step(model):
    model(batch())
    first = ranges(model)
    assert first
    model(batch(3.0, seed=2))
    for name, value in ranges(model).items():
        assert torch.equal(value, first[name])
    step(model, batch(3.0, seed=2))
    before = ranges(model)
    model(batch(3.0, seed=3))
    assert any(not torch.equal(v[:2], before[n][:2]) for n, v in ranges(model).items())


def test_a_step_that_leaves_the_first_parameter_is_a_step(model):
    model(batch())
    before = ranges(model)
    with torch.no_grad():
        model.last.bias.add_(1.0)
    model(batch(3.0, seed=2))
    assert all(
        not torch.equal(v[:2], before[n][:2]) for n, v in ranges(model).items() if "first" in n
    )


class Blocks(nn.Module):
    """Checkpointed modules, as timm does it."""

    def __init__(self, reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(COLS, COLS), nn.LayerNorm(COLS), nn.GELU())
        self.last = nn.Linear(COLS, 8)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()
        if self.reentrant is None:
            return self.last(self.block(x))
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_moves_nothing(reentrant):
    seed_torch(0)
    model = mesa_train.wrap(Blocks(reentrant), "paper")
    plain = copy.deepcopy(model)
    plain.reentrant = None
    for seed in range(3):
        output = model(batch(1 + seed, seed))
        output.square().mean().backward()
        after = ranges(model)
        plain(batch(1 + seed, seed)).square().mean().backward()
        expected = ranges(plain)
        for name, value in expected.items():
            # A reentrant checkpoint's first pass records nothing, so its recompute is the step's only update.
            assert torch.equal(after[name][:2], value[:2]), name
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        for m in (model, plain):
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(1e-3 * p.grad)
            m.zero_grad()


class Encoder(Net):
    """With entry points besides `forward`."""

    def encode(self, x):
        return F.gelu(self.norm(self.first(x)))

    def forward(self, x):
        return self.last(self.encode(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_ranges_move_whatever_is_called(checkpointed):
    """By a method of the model's own, with a micro-batch more, as by its forward."""
    seed_torch(0)
    whole, parts = (mesa_train.wrap(Encoder(), "paper") for _ in range(2))
    parts.load_state_dict(whole.state_dict())

    def by_parts(x):
        if checkpointed:
            return parts.last(checkpoint(parts.encode, x, use_reentrant=False))
        return parts.last(parts.encode(x))

    for seed in range(3):
        for forward, model in ((whole, whole), (by_parts, parts)):
            model.zero_grad()
            for micro in range(2):
                forward(batch(1.0 + seed, 2 * seed + micro)).square().mean().backward()
            with torch.no_grad():
                for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                    p.sub_(1e-3 * q.grad)
        before, after = ranges(whole), ranges(parts)
        # The GELU, which `encode` calls from outside, is not recorded; the Linear behind it keeps its input then.
        for name in ("first.linear.input.0", "norm.layer_norm.normalized.0"):
            value = before[name]
            torch.testing.assert_close(after[name][:2], value[:2])
            assert value[2, 0] == after[name][2, 0] == seed + 1
        assert after["last.linear.input.0"][2, 0] == seed + 1


def test_ranges_outlive_a_way_over_the_meta_device(model):
    step(model, batch())
    before, state = ranges(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.half().float()
    for name, value in ranges(model).items():
        assert torch.equal(value, before[name])
        assert value.dtype is torch.float32


def test_state_stays_out_of_the_state_dict(model):
    keys = set(Net().state_dict())
    assert set(model.state_dict()) == keys
    step(model, batch())
    assert ranges(model)
    assert set(model.state_dict()) == keys
    Net().load_state_dict(model.state_dict())
    model.load_state_dict(Net().state_dict())
    assert not list(model.buffers())
    mesa_train.unwrap(model)
    assert not ranges(model)
    assert type(model) is Net


def test_wrapping_again_starts_anew(model):
    step(model, batch())
    mesa_train.wrap(model, "paper")
    assert not ranges(model)


def test_another_dtype(model):
    step(model, batch())
    model.double()
    step(model, batch().double())
    assert all(p.grad.dtype is torch.float64 for p in model.parameters())
    model.to(torch.bfloat16)
    step(model, batch().bfloat16())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.to("cpu")


def test_deepcopy_is_independent(model):
    step(model, batch())
    other = copy.deepcopy(model)
    before = ranges(model)
    for name, value in ranges(other).items():
        assert torch.equal(value, before[name])
    step(other, batch(5.0, seed=4))
    step(other, batch(5.0, seed=5))
    for name, value in ranges(model).items():
        assert torch.equal(value, before[name])
    assert any(not torch.equal(v, before[n]) for n, v in ranges(other).items())


def test_a_later_forward_does_not_corrupt_an_earlier_one(model):
    other = copy.deepcopy(model)
    expected = torch.autograd.grad(other(batch()).square().mean(), list(other.parameters()))
    unused = nn.Parameter(torch.zeros(1))
    model.register_parameter("unused", unused)
    first = model(batch()).square().mean()
    # The forward of another step, which leaves the weights that the first one needs, and worse.
    with torch.no_grad():
        unused.add_(1)
    before = ranges(model)
    model(batch(7.0, seed=2))
    assert any(not torch.equal(v, before[n]) for n, v in ranges(model).items())
    for module in model.modules():
        for value in entry_of(module).context.ranges.values():
            value.mul_(50.0)
    found = torch.autograd.grad(first, [p for p in model.parameters() if p is not unused])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_gradients_are_close_to_plains(model):
    x = batch()
    plain = mesa_train.unwrap(copy.deepcopy(model))
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        # 8 bits, stochastic, with one range for a whole batch.
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm()


def test_non_finite_values_are_seen(model):
    x = batch()
    x[3, 5] = float("inf")
    model(x).sum().backward()
    assert not model.first.weight.grad.isfinite().all()
    step(model, batch())
    model.zero_grad()
    model(batch()).sum().backward()


def test_the_same_batch_gives_the_same_gradients(model):
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(batch()).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compress_uses_the_tensors_own_ranges():
    x = batch().requires_grad_().mul(1.0)
    weight = torch.randn(8, COLS, requires_grad=True)
    with mesa_train.compress("paper"):
        y = F.linear(x, weight)
    (found,) = torch.autograd.grad(y.sum(), weight)
    (expected,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_tensors_without_values_move_nothing(model):
    from torch._subclasses import FakeTensorMode

    model(batch()).sum().backward()
    before = ranges(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            model(torch.empty(ROWS, COLS)).sum()
    model.to("meta")
    for _ in range(2):
        model(batch().to("meta")).sum().backward()
    assert before
    assert all(torch.equal(value, before[name]) for name, value in ranges(model).items())
    model.to_empty(device="cpu")
    # The gradients are as empty as the weights.
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    model(batch()).sum().backward()
    assert model.last.weight.grad.isfinite().all()
