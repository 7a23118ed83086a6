"""Gradient accumulation, and every precision a step can run in: float64, float32, bfloat16 (autocast and
pure), float16 with a GradScaler that overflows, channels-last."""

import contextlib
import copy
import functools

import pytest
import torch
from integration_models import (
    BOUND,
    EIGHT,
    LOSSLESS,
    POLICIES,
    Net,
    batch,
    distance,
    gradients,
    step,
)
from torch import nn

import mesa_train

PRESETS = pytest.mark.parametrize("preset", POLICIES)


@PRESETS
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.compatibility("Gradient accumulation", "one process")
def test_micro_batches_add_up_to_the_batch(pieces, preset):
    x = batch(rows=8)
    plain = Net(drop=0.0)
    plain(x).square().mean().backward()
    model = mesa_train.wrap(Net(drop=0.0), POLICIES[preset])
    outputs = [model(part).square().mean() / pieces for part in x.chunk(pieces)]
    for output in reversed(outputs):  # every forward before the first backward
        output.backward()
    assert distance(gradients(model), gradients(plain)) <= BOUND[preset]
    if preset in ("lossless", "mesa8"):
        # Codes belong to a token: the batch at once has the very same.
        whole = mesa_train.wrap(Net(drop=0.0), POLICIES[preset])
        whole(x).square().mean().backward()
        assert distance(gradients(model), gradients(whole)) <= 1e-6


AUTOCASTS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
}


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@PRESETS
@pytest.mark.parametrize("precision", AUTOCASTS)
@pytest.mark.compatibility("Precision", "{precision}")
def test_precision(precision, preset):
    """As far from the float32 gradient as plain PyTorch is, and the codes' own error."""
    dtype, cast = AUTOCASTS[precision]
    exact = step(Net().double(), batch().double())[2]

    def run(model):
        with autocast(cast):
            return step(model, batch().to(dtype))

    plain = run(Net().to(dtype))
    found = run(mesa_train.wrap(Net().to(dtype), POLICIES[preset]))
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], exact) <= 1.5 * distance(plain[2], exact) + BOUND[preset]


@pytest.mark.parametrize("preset", ["mesa8", "lossless"])
@pytest.mark.compatibility("Precision", "set_float32_matmul_precision")
def test_float32_matmul_precision(preset):
    torch.set_float32_matmul_precision("medium")
    try:
        plain, found = step(Net(), batch()), step(mesa_train.wrap(Net(), POLICIES[preset]), batch())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], plain[2]) <= BOUND[preset]


@PRESETS
@pytest.mark.compatibility("Precision", "GradScaler with overflows")
def test_a_gradient_scaler_sees_overflows(preset):
    """The scale is too large at first: steps are skipped and it is halved until one passes, at the
    same step as without mesa_train."""

    def run(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
        history = []
        for number in range(14):
            before = copy.deepcopy(model.state_dict())
            with torch.autocast("cpu", torch.float16):
                loss = model(batch(seed=number)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
            history.append((moved, scaler.get_scale()))
        return history

    expected, found = run(Net(drop=0.0)), run(mesa_train.wrap(Net(drop=0.0), POLICIES[preset]))
    moved = [m for m, _ in expected]
    assert not moved[0]
    assert moved[-1]
    assert found == expected


@pytest.mark.parametrize("preset", ["mesa8", "mesa8-recompute", "paper"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.compatibility("Precision", "inf and nan in the forward")
def test_an_overflow_in_the_forward_reaches_the_gradients(value, preset):
    model = mesa_train.wrap(
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), POLICIES[preset]
    )
    x = batch(inputs=32)
    x[0, 0, 0] = value
    model(x).sum().backward()
    assert not gradients(model).isfinite().all()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(4, 16)
        self.batch_norm, self.act = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        x = self.batch_norm(self.stem(images))
        x = x + self.act(self.depthwise(self.norm(x)))
        return self.head(x.mean((2, 3)))


@PRESETS
@pytest.mark.compatibility("Precision", "channels-last")
def test_channels_last(preset):
    def run(model):
        model = model.to(memory_format=torch.channels_last)
        seen = []
        model.depthwise.register_forward_hook(lambda m, a, output: seen.append(output))
        found = step(model, torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        return found

    torch.manual_seed(3)
    plain = run(Convolutions())
    torch.manual_seed(3)
    found = run(mesa_train.wrap(Convolutions(), POLICIES[preset]))
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], plain[2]) <= BOUND[preset]
    assert found[0] < plain[0]


def test_policies_differ():
    """The bounds above tell something: lossless is exact where eight bits are not."""
    plain = step(Net(), batch())[2]
    errors = [
        distance(step(mesa_train.wrap(Net(), p), batch())[2], plain) for p in (LOSSLESS, EIGHT)
    ]
    assert errors[0] < 1e-6 < errors[1]
    assert functools.reduce(max, errors) < 0.02
