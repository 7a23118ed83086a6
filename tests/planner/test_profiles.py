"""The planner's arithmetic on profiles that are made by hand, and profiles on disk."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from mesa_train import measure
from mesa_train.measure.profiling.blocks import Block, BlockOption
from mesa_train.measure.profiling.candidates import KEEP, REBUILD, Candidate
from mesa_train.measure.profiling.profile import Profile, Profiler
from mesa_train.measure.profiling.sensitivity import Sensitivity
from mesa_train.measure.profiling.simulator import Order, Row
from mesa_train.measure.profiling.times import TimeModel
from mesa_train.measure.stash_log import BLOCK
from mesa_train.planner.plan import OverBudget
from mesa_train.planner.planner import Planner

pytest.importorskip("highspy")

A, B = ("0", "activation", "input"), ("1", "activation", "input")
ROWS, COLS = 64, 1280
WHOLE = 4 * ROWS * COLS
# 1, 1/2 and 1/4 byte an element, and 4 bytes for each group of 128, 64 and 32.
BYTES = {
    8: ROWS * COLS + 4 * ROWS * COLS // 128,
    4: ROWS * COLS // 2 + 4 * ROWS * COLS // 64,
    2: ROWS * COLS // 4 + 4 * ROWS * COLS // 32,
    KEEP: WHOLE,
}
# No plan here takes 6, 5 or 3 bits: they are too slow.
SECONDS = {8: 0.010, 4: 0.012, 2: 0.014, KEEP: 0.0} | dict.fromkeys((6, 5, 3), 1e3)
VARIANCE = {8: 1e-6, 4: 3e-4, 2: 7e-3, KEEP: 0.0} | dict.fromkeys((6, 5, 3), 1e3)


def by_hand(blocks=(), floor=0.0, plain_s=1.0, rows=None):
    """Two activations whose bytes are all live at one moment, beside 1,000 bytes."""
    candidates = tuple(
        Candidate(key, order, [(ROWS, COLS)], WHOLE) for order, key in enumerate((A, B))
    )
    order = Order([(A, 1.0), (B, 1.0)], {c.key: c for c in candidates})
    per_choice = [(c.key, choice) for c in candidates for choice in SECONDS]
    return Profile(
        candidates=candidates,
        siblings={},
        blocks=tuple(blocks),
        order=order,
        rows={(None, None): [Row(1000.0, 2)]} if rows is None else rows,
        times=TimeModel({(k, c): SECONDS[c] for k, c in per_choice}, {}, {}),
        sensitivity=Sensitivity({(k, c): VARIANCE[c] for k, c in per_choice}, {}, floor, 0),
        plain_s=plain_s,
        static_bytes=5000,
        plain_saved_bytes=2 * WHOLE,
        plain_peak_bytes=2 * WHOLE + 1000,
        other_saved_bytes=10,
    )


def test_the_cheapest_choice_that_fits():
    """8 bits cost 10 ms and an error of 0.1 %; a squared error of 0.05^2 is worth 0.1 s."""
    plan = Planner(by_hand()).plan(5000 + 1000 + BYTES[8] + WHOLE)
    assert sorted(map(str, plan.choices.values())) == ["8", "keep"]
    assert plan.prediction.peak_bytes == 5000 + 1000 + BYTES[8] + WHOLE
    assert plan.prediction.saved_bytes == 10 + BYTES[8] + WHOLE
    assert plan.prediction.time_ratio == pytest.approx(1.010)
    assert plan.prediction.gradient_error == pytest.approx(math.sqrt(1e-6))
    assert plan.prediction.step_s == pytest.approx(1.010)


def test_both_in_8_bits():
    plan = Planner(by_hand()).plan(5000 + 1000 + 2 * BYTES[8])
    assert plan.choices == {A: 8, B: 8}
    assert plan.prediction.gradient_error == pytest.approx(math.sqrt(2e-6))
    assert plan.policy.overrides == {"activation.input": {"bits": 8, "group_size": 128}}


def test_the_least_peak_and_what_is_below_it():
    planner = Planner(by_hand())
    smallest = planner.plan()
    assert smallest.choices == {A: 2, B: 2}
    assert smallest.prediction.peak_bytes == 5000 + 1000 + 2 * BYTES[2]
    with pytest.raises(OverBudget) as raised:
        planner.plan(smallest.prediction.peak_bytes - 1000)
    assert raised.value.smallest.prediction == smallest.prediction


def test_plain_where_all_fits():
    profile = by_hand(floor=4e-6)
    planner = Planner(profile)
    plan = planner.plan(5000 + profile.plain_peak_bytes)
    assert not plan.policy.enabled
    assert plan.prediction == planner.plain
    assert planner.plain.gradient_error == pytest.approx(0.002)


def test_bounds_of_error_and_time():
    planner = Planner(by_hand(floor=1e-4))
    bounded = planner.plan(max_error=0.03)
    # Twice 3e-4 is within 0.03^2 = 9e-4, with 7e-3 it is not.
    assert bounded.choices == {A: 4, B: 4}
    assert bounded.prediction.gradient_error == pytest.approx(math.sqrt(1e-4 + 6e-4))
    fast = planner.plan(max_time=1.015)
    assert fast.prediction.time_ratio <= 1.015
    with pytest.raises(ValueError, match=r"at least 1, got 0\.9"):
        planner.plan(max_time=0.9)


def test_without_times():
    planner = Planner(by_hand(plain_s=None))
    assert planner.plan(5000 + 1000 + 2 * BYTES[8]).prediction.time_ratio is None
    with pytest.raises(ValueError, match="needs a timed plain step"):
        planner.plan(max_time=1.1)


def test_a_block_is_checkpointed_where_that_costs_less():
    """Checkpointing takes 5 ms and keeps 200 bytes; the codes inside take 10 ms."""
    option = BlockOption(200, 0.005, 0.0)
    profile = by_hand([Block("0", {"checkpoint": option})])
    inside = dataclasses.replace(profile.candidates[0], block="0")
    candidates = (inside, profile.candidates[1])
    order = Order(
        [(("0", BLOCK, "begin"), 0.0), (A, 1.0), (("0", BLOCK, "end"), 0.0), (B, 1.0)],
        {c.key: c for c in candidates},
        {("0", "checkpoint"): 200},
    )
    rows = {(None, None): [Row(1000.0, 4)]}
    profile = dataclasses.replace(profile, candidates=candidates, order=order, rows=rows)
    plan = Planner(profile).plan(5000 + 1000 + WHOLE + 300)
    assert plan.choices == {("0", BLOCK, ""): "checkpoint", B: KEEP}
    assert plan.policy.checkpoint == ("0",)
    assert plan.prediction.saved_bytes == 10 + 200 + WHOLE
    assert plan.prediction.time_ratio == pytest.approx(1.005)


def test_a_frontier_gets_cheaper():
    plans = Planner(by_hand()).frontier(points=6)
    assert len(plans) >= 3
    peaks = [plan.prediction.peak_bytes for plan in plans]
    costs = [plan.cost for plan in plans]
    assert peaks == sorted(peaks)
    assert costs == sorted(costs, reverse=True)


def test_a_profile_comes_back_from_disk(tmp_path):
    with torch.device("meta"):
        layers = [nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)]
        model, x = nn.Sequential(*layers), torch.empty(4096, 64)
    profile = measure.profile(model, x)
    assert isinstance(profile, measure.Profile)
    profile.save(tmp_path / "profile.json")
    assert measure.Profile.load(tmp_path / "profile.json") == profile
    assert any(c.offloadable for c in profile.candidates)


def test_a_profile_alone_plans_about_as_the_model_does():
    with torch.device("meta"):
        layers = [
            layer for _ in range(4) for layer in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        ]
        model, x = nn.Sequential(*layers), torch.empty(4096, 64)
    profiler = Profiler(model, x)
    from_profile, counted = Planner(profiler.profile), Planner(profiler.profile, profiler)
    assert from_profile.plain == counted.plain
    budget = int(0.7 * from_profile.plain.peak_bytes)
    first, second = from_profile.plan(budget).prediction, counted.plan(budget).prediction
    assert first.peak_bytes == pytest.approx(second.peak_bytes, rel=0.1)
    # What is said of choices that the model is asked about too is the same to a few bytes.
    choices = counted.plan(budget).choices
    saved, offloaded = profiler.profile.saved_bytes(choices)
    assert saved == pytest.approx(second.saved_bytes, abs=64)
    assert offloaded == second.offloaded_bytes


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 0}', '{"version": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "no.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no\.json is not a profile of this version"):
        Profile.load(path)


def test_a_rebuilt_candidate_needs_its_product():
    profile = by_hand()
    rebuilt = dataclasses.replace(profile.candidates[0], product="0", source=B)
    candidates = (rebuilt, profile.candidates[1])
    times = profile.times._replace(
        candidates={**profile.times.candidates, (A, REBUILD): 0.0}, matmuls={"0": 0.5}
    )
    variance = {**profile.sensitivity.variance, (A, REBUILD): 0.0}
    sensitivity = dataclasses.replace(profile.sensitivity, variance=variance)
    order = dataclasses.replace(profile.order, candidates={c.key: c for c in candidates})
    profile = dataclasses.replace(
        profile, candidates=candidates, times=times, sensitivity=sensitivity, order=order
    )
    plan = Planner(profile).plan(5000 + 1000 + BYTES[2] + 100)
    assert plan.choices[A] == REBUILD
    assert plan.prediction.time_ratio == pytest.approx(1 + 0.5 + SECONDS[2])


def test_json_holds_plain_values(tmp_path):
    by_hand().save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["version"] == 2
    assert Profile.load(tmp_path / "p.json") == by_hand()


def test_an_untimed_step_is_estimated():
    """Repeated matmuls are about a fifth of a step; without any, 8-bit codes are about a tenth."""
    assert by_hand(plain_s=0.3).step_s == 0.3
    untimed = by_hand(plain_s=None)
    assert untimed.step_s == pytest.approx(10 * 2 * SECONDS[8])
    times = untimed.times._replace(matmuls={"0": 0.02, "1": 0.03})
    assert dataclasses.replace(untimed, times=times).step_s == pytest.approx(5 * 0.05)
