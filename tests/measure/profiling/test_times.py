"""What whole steps took comes back from the parts that it was shared out over."""

import pytest
import torch

from mesa_train.measure.profiling.candidates import KEEP, REBUILD, Candidate
from mesa_train.measure.profiling.times import CHECKPOINT, CHECKPOINT_CODES, OpTimings, times

SITES = [
    Candidate(("0", "layer_norm", "normalized"), 0, [(100, 64)], 25_600, block="0"),
    Candidate(
        ("0", "attention", "q"),
        1,
        [(100, 64)],
        12_800,
        "0.qkv",
        ("0", "layer_norm", "normalized"),
        "0",
    ),
    Candidate(("1", "fallback", "saved"), 2, [(100, 32)], 6_400, block="1"),
]
ALONE = {(s.key, c): {8: 1.0, 4: 2.0, 2: 3.0}.get(c, 0.0) for s in SITES for c in s.choices()}
STEPS = {8: 6.0, 4: 7.0, KEEP: -1.0, REBUILD: 9.0, CHECKPOINT: 12.0, CHECKPOINT_CODES: 18.0}
FORWARDS = {"0": 10.0, "1": 30.0}


def test_without_steps_the_operators_alone():
    result = times(SITES, ALONE, {"0.qkv": 5.0}, FORWARDS, {})
    assert result.candidates == ALONE
    assert result.matmuls == {"0.qkv": 5.0}
    assert result.blocks["0", CHECKPOINT] == 10
    # The codes of its two candidates beside its forward.
    assert result.blocks["0", CHECKPOINT_CODES] == 12


@pytest.mark.parametrize("choice", [8, 4, KEEP])
def test_sites_add_up_to_the_step(choice):
    result = times(SITES, ALONE, {"0.qkv": 5.0}, FORWARDS, STEPS)
    # The fallback has no 4 bits: it took 8 in that step, and its share is left with it.
    shares = [(s, choice) for s in SITES if choice in s.choices()]
    total = sum(result.candidates[s.key, c] for s, c in shares)
    left_out = sum(s.elements for s in SITES if choice not in s.choices()) / 16_000
    op_seconds = sum(ALONE[s.key, choice if choice in s.choices() else 8] for s in SITES)
    out = sum(ALONE[s.key, 8] for s in SITES if choice not in s.choices())
    assert total == pytest.approx(STEPS[choice] - out - left_out * (STEPS[choice] - op_seconds))


def test_a_repeated_matmul_costs_what_rebuilding_took():
    result = times(SITES, ALONE, {"0.qkv": 5.0}, FORWARDS, STEPS)
    saved = result.candidates[SITES[1].key, 8]
    assert result.matmuls["0.qkv"] - saved == pytest.approx(STEPS[REBUILD] - STEPS[8])
    assert result.candidates[SITES[1].key, REBUILD] == 0


def test_checkpoints_by_their_arithmetic():
    result = times(SITES, ALONE, {"0.qkv": 5.0}, FORWARDS, STEPS)
    assert result.blocks["1", CHECKPOINT] == pytest.approx(3 * result.blocks["0", CHECKPOINT])
    assert sum(result.blocks[b, CHECKPOINT_CODES] for b in FORWARDS) == pytest.approx(18)
    # A measurement that says a second forward takes nothing is noise.
    noisy = times(SITES, ALONE, {"0.qkv": 5.0}, FORWARDS, {**STEPS, CHECKPOINT: -4.0})
    assert sum(noisy.blocks[b, CHECKPOINT] for b in FORWARDS) == pytest.approx(12)


@pytest.mark.parametrize("set_by_user", [True, False])
def test_costs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch, set_by_user):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache") if set_by_user else "")
    folder = tmp_path / "cache" if set_by_user else tmp_path / "home/.cache"
    timings = OpTimings(torch.device("meta"), torch.float32)
    assert timings.path == folder / "mesa_train/timings.json"
