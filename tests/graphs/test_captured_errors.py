"""A captured step that can no longer compute what a plain loop computes says so in one line."""

import random

import pytest
import torch
import torch.nn.functional as F
from captured_models import batches, network
from torch import nn

import mesa_train
from mesa_train import CaptureError


def test_moved_and_frozen_weights_are_errors_until_reset(record):
    model = network()
    record(model)
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=1)
    x, y = batches(1)[0]
    for _ in range(2):
        step(x, y)
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(CaptureError, match=r"0\.weight has other memory.*reset\(\)"):
        step(x, y)
    step.reset()
    for _ in range(2):
        step(x, y)
    model[0].weight.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"0\.weight\.requires_grad has changed"):
        step(x, y)


def test_a_parameter_that_some_batches_train_is_an_error(record):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.one(x) if len(x) > 5 else self.one(x) + self.two(x)

    model = Sometimes()
    record(model)
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=1)
    for x, y in batches(2):
        step(x, y)
    with pytest.raises(CaptureError, match=r"two\.weight has a gradient in some steps only"):
        step(*batches(1, rows=4)[0])


def test_a_failed_capture_is_one_line_and_leaves_the_gradients(record):
    model = network()
    recorder = record(model)
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=1)
    x, y = batches(1)[0]
    step(x, y)
    before = [p.grad for p in model.parameters()]

    def broken(function):
        function()
        raise RuntimeError("capture invalidated")

    recorder.capture = broken
    with pytest.raises(CaptureError) as caught:
        step(x, y)
    assert "\n" not in str(caught.value)
    assert "PyTorch cannot capture forward and backward" in str(caught.value)
    assert "capture invalidated" in str(caught.value)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


def test_the_cause_inside_the_model_comes_first(record):
    """torch.cuda.graph raises its own error while it handles the model's."""
    model = network()
    recorder = record(model)

    def loss(output, y):
        if "capture" in recorder.log:
            raise RuntimeError("operation not permitted when stream is capturing")
        return F.cross_entropy(output, y)

    capture = recorder.capture

    def ends_badly(function):
        try:
            return capture(function)
        except RuntimeError as error:
            raise RuntimeError("capture_end: stream is invalid") from error

    recorder.capture = ends_badly
    step = mesa_train.capture_step(model, loss, warmup=1)
    x, y = batches(1)[0]
    step(x, y)
    with pytest.raises(CaptureError, match=r"not permitted.*test_captured_errors\.py, line \d+"):
        step(x, y)


@pytest.mark.parametrize("library", ["Python's random", "numpy.random", "torch on the CPU"])
def test_random_numbers_of_the_host_are_refused(record, library, monkeypatch):
    import numpy as np

    draws = {
        "Python's random": random.random,
        "numpy.random": np.random.rand,
        "torch on the CPU": lambda: torch.rand(()).item(),
    }
    model = nn.Linear(6, 4)
    recorder = record(model)
    # A GPU's capture does not touch the CPU's generator. The recorder would hide this draw.
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    step = mesa_train.capture_step(
        model, lambda out, y: F.cross_entropy(out * draws[library](), y), warmup=1
    )
    x, y = batches(1)[0]
    step(x, y)
    with pytest.raises(CaptureError, match=f"draws from the generator of {library}"):
        step(x, y)
    assert "replay" not in recorder.log
