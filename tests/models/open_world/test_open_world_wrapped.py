"""The open-world detector under mesa_train: the same outputs and losses, gradients within the codec's error."""

import copy

import open_world_cases as cases
import pytest
import torch

import mesa_train
from mesa_train.policy import PRESETS

# Lossless differs by the order of sums.
EXACT = 1e-6


class Step:
    """Calling it gives the losses, gradients and buffers of two steps from one state and seed."""

    def __init__(self, model, *inputs):
        self.model, self.inputs = model, inputs
        self.state = copy.deepcopy(model.state_dict())

    def __call__(self):
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        torch.manual_seed(1)
        losses = [self.model(*self.inputs) for _ in range(2)]
        sum(sum(each.values()) for each in losses).backward()
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return losses, torch.cat(gradients), buffers


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = cases.detector()
    step = Step(model, *cases.batch((2, 0)))
    losses, gradient, buffers = step()
    assert losses[1]["loss_clustering"] > 0
    model.eval()
    with torch.no_grad():
        detections = model(step.inputs[0])
    model.train()
    return step, losses, gradient, buffers, detections


@pytest.mark.parametrize("policy", PRESETS)
def test_outputs_and_losses_are_plains(plain, policy):
    step, losses, gradient, buffers, detections = plain
    mesa_train.wrap(step.model, policy)
    try:
        new, other, state = step()
        step.model.eval()
        with torch.no_grad():
            again = step.model(step.inputs[0])
        step.model.train()
    finally:
        mesa_train.unwrap(step.model)
    for one, two in zip(new, losses, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    for name, value in buffers.items():
        assert torch.equal(state[name].nan_to_num(), value.nan_to_num()), name
    for one, two in zip(again, detections, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    error = ((other - gradient).norm() / gradient.norm()).item()
    assert error <= (EXACT if policy == "lossless" else 1.5)
    if policy in ("mesa8", "mesa4"):
        assert EXACT < error < {"mesa8": 3e-2, "mesa4": 0.3}[policy]
