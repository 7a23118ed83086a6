"""Budgets of steps that vary: several shapes, and first steps that take more than was predicted."""

import os

import pytest
import timm
import torch
from torch import nn

import mesa_train
from mesa_train.engine.wrap import policy_of
from mesa_train.measure.optimizer_states import static_bytes
from mesa_train.measure.timeline import timeline
from mesa_train.planner.plan import OverBudget
from mesa_train.planner.refine import PeakWatch
from mesa_train.policy import PRESETS

pytest.importorskip("highspy")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.mark.slow
def test_a_plan_bounds_the_worst_of_several_shapes():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        num_classes=10,
        embed_dim=48,
        num_heads=3,
        depth=2,
        dynamic_img_size=True,
    ).train()
    batches = [torch.randn(64, 3, 32, 32), torch.randn(48, 3, 96, 96), torch.randn(16, 3, 64, 64)]

    def peaks(policy):
        return [
            static_bytes(model, b, None) + timeline(model, b, policy=policy).peak_bytes
            for b in batches
        ]

    smallest = mesa_train.plan(model, batches[0], more_inputs=batches[1:])
    assert smallest.worst == 1
    budget = (smallest.prediction.peak_bytes + max(peaks("plain"))) // 2
    plan = mesa_train.plan(model, batches[0], budget, more_inputs=batches[1:])
    assert max(peaks("plain")) > budget
    assert max(peaks(plan.policy)) <= plan.prediction.peak_bytes <= budget
    # The first batch alone fits without a policy.
    assert not mesa_train.plan(model, batches[0], budget).policy.enabled
    with pytest.raises(OverBudget):
        mesa_train.plan(model, batches[0], smallest.prediction.peak_bytes // 2, more_inputs=batches)
    assert policy_of(model) is None


class Given:
    """A planner whose plans are known, by budget."""

    def __init__(self, presets):
        self.presets, self.budgets = presets, []

    def plan(self, budget=None):
        self.budgets.append(budget)
        if budget not in self.presets:
            raise OverBudget("no policy fits", None)
        return type("Plan", (), {"policy": PRESETS[self.presets[budget]]})


def watched(peaks, presets, steps=2):
    """(the model after a forward for each peak, the budgets that were planned for)."""
    model = mesa_train.wrap(nn.Sequential(nn.Linear(8, 8), nn.GELU()), "mesa8")
    given, reader = Given(presets), iter(peaks)
    PeakWatch(model, given, 100, steps, lambda: next(reader))
    with torch.no_grad():
        model(torch.randn(2, 8))  # an evaluation is no step
    for _ in peaks:
        model(torch.randn(2, 8)).sum().backward()
    return model, given.budgets


def test_a_step_over_the_budget_is_planned_again():
    """The first reading is of what came before the first step."""
    model, budgets = watched([999, 130, 120, 90, 80], {70: "mesa4", 50: "mesa4-recompute"})
    assert budgets == [70, 50]
    assert policy_of(model) == PRESETS["mesa4-recompute"]
    assert not model._forward_pre_hooks


def test_steps_within_the_budget_change_nothing():
    model, budgets = watched([999, 100, 90], {})
    assert budgets == []
    assert policy_of(model) == PRESETS["mesa8"]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("peak", [130, 10**6])
def test_without_another_plan_a_warning_stays(peak, caplog):
    model, _ = watched([999, peak], {})
    assert policy_of(model) == PRESETS["mesa8"]
    assert "no other plan fits" in caplog.text
    assert not model._forward_pre_hooks


def test_batches_without_a_budget_are_refused():
    with pytest.raises(ValueError, match="only with a budget"):
        mesa_train.wrap(nn.Linear(2, 2), more_inputs=[torch.randn(2, 2)])
    with pytest.raises(ValueError, match="refine_steps must be at least 0"):
        mesa_train.wrap(nn.Linear(2, 2), budget="1GiB", inputs=torch.randn(2, 2), refine_steps=-1)
