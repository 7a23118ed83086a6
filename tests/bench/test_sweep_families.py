"""The sweep of families: a few small models of it, and the table of its rows."""

import functools

import family_models
import pytest
import sweep_families
import sweeping
import torch
from sweeping import limited
from tables import families

from mesa_train.utils import records


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("transformers")
    found, missing = family_models.load(["encoders", "dense", "language", "distillation"])
    assert not missing
    return found


def row_of(cases, name):
    row = limited(functools.partial(sweep_families.measure, cases[name]), 3600)
    assert not row["failure"], row
    return {"model": name, **row}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", ["DINOv2", "SAM", "Qwen2.5-VL tower", "DINO multi-crop"])
def test_a_family_is_exact_and_saves_memory(cases, name):
    row = row_of(cases, name)
    assert row["outputs_equal"]
    assert row["lossless_error"] < 1e-5
    assert 0 < row["mesa8_error"] < 0.03
    saved = row["saved_bytes"]
    assert saved["plain"] > 4 * saved["mesa8"] > 4 * saved["mesa4"]
    assert saved["lossless"] <= saved["plain"]
    assert saved["mesa8-recompute"] <= saved["mesa8"]
    assert sum(row["uncompressed"].values()) < saved["mesa8"]
    if name == "DINOv2":
        adapted = row["lora"]["saved_bytes"]
        assert saved["plain"] / 2 < adapted["plain"] < saved["plain"]
        assert adapted["mesa8"] < adapted["plain"] / 3
        assert 0 < row["lora"]["mesa8_error"] < 0.03
        assert row["lora"]["trained"] == 3 * 2 * 2 * 8 * 96


def test_a_table_has_the_reason_of_a_small_factor():
    row = {
        "model": "one",
        "group": "g",
        "failure": "",
        "outputs_equal": True,
        "lossless_error": 0.0,
        "mesa8_error": 0.01,
        "saved_bytes": {"plain": 1000, "mesa8": 500, "mesa4": 400, "mesa8-recompute": 450},
        "uncompressed": {"instance_norm": 300, "mul": 5},
    }
    old = {**row, "outputs_equal": False}
    timed = {**row, "model": "three", "step_ms": {"plain": 10.0, "mesa8": 12.5}}
    fails = {**row, "model": "two", "failure": "ValueError: no"}
    text = families.sweep_families.render([old, row, fails, timed])
    line = next(line for line in text.splitlines() if line.startswith("| one"))
    assert "| equal |" in line
    assert "| 2.0 | 2.5 | 2.2 |" in line
    line_of_times = next(line for line in text.splitlines() if line.startswith("| three"))
    assert "| 2.2 |  | 1.25 |" in line_of_times
    assert "uncompressed: instance_norm 60%" in line
    assert "mul" not in line
    assert "fails: ValueError" in text


def test_steps_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    clock = iter(range(1000))
    calls = []
    monkeypatch.setattr(sweeping.time, "perf_counter", lambda: next(clock) / 1000)

    def run(name, ticks):
        calls.append(name)
        for _ in range(ticks if len(calls) > 2 else 50):
            next(clock)

    steps = {
        "plain": functools.partial(run, "plain", 2),
        "mesa8": functools.partial(run, "mesa8", 4),
    }
    assert sweeping.step_times(steps, 3) == pytest.approx({"plain": 3.0, "mesa8": 5.0})
    assert calls == ["mesa8", "plain", "plain", "mesa8", "mesa8", "plain", "plain", "mesa8"]


class Compressed(torch.nn.Module):
    """Tensors of 8 KiB, smaller than the default `min_bytes`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


class Uncompressed(torch.nn.Module):
    """An operator without a row: half of the saved bytes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x):
        return torch.atan2(self.weight * x, x + 3)


class Chaotic(torch.nn.Module):
    """The logistic map: after some steps, rounding errors decide its value."""

    def __init__(self):
        super().__init__()
        self.start = torch.nn.Parameter(torch.full((32, 64), 0.3))

    def forward(self, x):
        y = self.start + 0.1 * x.sigmoid()
        for _ in range(60):
            y = 3.9 * y * (1 - y)
        return y


def test_a_gradient_that_rounding_errors_decide_is_no_error_of_a_preset():
    row, model = {}, Chaotic()
    before = model.start.detach().clone()
    sweeping.compare_runs(model, torch.randn(32, 64), row, sweep_families.RUNS)
    assert row["outputs_equal"]
    assert row["mesa8_error"] > 0.05
    assert row["perturbed_error"] > 0.05
    assert torch.equal(model.start, before)


def test_a_sweep_has_a_row_a_model_and_a_table(tmp_path):
    out = tmp_path / "rows.jsonl"

    def absent():
        raise ImportError("needs natten")

    makers = {
        "compressed": lambda: (Compressed(), torch.randn(32, 64)),
        "uncompressed": lambda: (Uncompressed(), torch.randn(32, 64)),
        "absent": absent,
    }
    sweeping.sweep_makers(makers.items(), out, seconds=3600, again=False)
    sweeping.sweep_makers(makers.items(), out, seconds=3600, again=False)
    rows = {row["model"]: row for row in records.read(out)}
    assert len(records.read(out)) == len(rows) == 3
    saved = rows["compressed"]["saved_bytes"]
    assert saved["plain"] > 3 * saved["mesa8"] > 3 * saved["mesa4"]
    assert rows["compressed"]["outputs_equal"]
    assert rows["absent"]["failed_in"] == "making"
    assert rows["uncompressed"]["uncompressed"]["atan2"] >= 32 * 64 * 4

    assert "perturbed_error" not in rows["compressed"]
    changing = {**rows["compressed"], "model": "changing", "perturbed_error": 1.2, "mesa8_error": 9}
    text = families.sweep_timm.render([*rows.values(), changing])
    assert "| 3 | 3 |" in text
    assert "900" not in text
    assert "plain's gradient changes by 120%" in text
    assert "uncompressed: atan2" in next(x for x in text.splitlines() if "| `uncompressed`" in x)
    assert "not compared: ImportError: needs natten" in text
    assert "| `compressed`" not in text
