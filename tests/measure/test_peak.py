"""Workspace is found at the moments where kernels take it, and closes the gap to the real peak."""

import pytest
import torch
from torch import nn

from mesa_train.measure.profiling.simulator import StepSimulator
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.step import default_loss
from mesa_train.measure.timeline import timeline
from mesa_train.policy import PRESETS, Policy


def test_a_convolution_in_another_layout():
    """The backward of a depthwise convolution copies its operands."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 7, padding=3, groups=32), nn.Conv2d(32, 4, 1)
    )
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 56, 56).to(memory_format=torch.channels_last)
    runs = StepRunner(model, images, None, default_loss)
    simulator = StepSimulator(model, images, None, default_loss, [])
    counted = timeline(model, images, policy=PRESETS["mesa8"])
    workspace = runs.workspace(PRESETS["mesa8"], counted)
    assert max(workspace, key=lambda key: workspace[key])[1] == "1"
    simulator.workspace[False] = workspace
    for policy in (PRESETS["mesa8"], Policy(bits=4), Policy(bits=32)):
        counted = timeline(model, images, policy=policy)
        real = runs.peak(policy)
        # What is counted alone is further off.
        assert abs(simulator.with_workspace(counted, {}).peak_bytes - real) <= 0.02 * real
        assert real - counted.peak_bytes > 0.02 * real


def test_moments_are_those_of_the_timeline():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(512, 64)
    runs = StepRunner(model, x, None, default_loss)
    counted = timeline(model, x, policy="mesa8")
    workspace = runs.workspace("mesa8", counted)
    assert {key for key in workspace if key[1]} == {
        (m.phase, m.module) for m in counted.moments if m.module
    }
    assert sum(workspace.values()) == pytest.approx(0, abs=2**20)
