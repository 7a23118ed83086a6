"""What the captions of tables say of the runs that their rows come from."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tables.engine import families
from tables.text import origin, origins
from tables.training import parity

from mesa_train import kernels

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench"


def row(commit="abc", date="2030-01-02", **changes):
    return {
        "device": "a CPU", "device_type": "cpu", "threads": 2, "versions": {"torch": "2.15.0"},
        "commit": commit, "date": f"{date}T03:04:05+00:00", **changes,
    }  # fmt: skip


def test_the_origin_of_rows_of_several_runs():
    assert origin(row()) == "a CPU, 2 threads, PyTorch 2.15.0, commit abc, 2030-01-02."
    assert origins([row(), row()]) == origin(row())
    several = [row(), row("def", "2030-01-05"), row("abc", "2030-01-01")]
    gpu = row("x", device="H200", device_type="cuda", threads=8)
    assert origins([*several, gpu]) == (
        "a CPU, 2 threads, PyTorch 2.15.0, commits abc, def, 2030-01-01 to 2030-01-05; "
        "H200, PyTorch 2.15.0, commit x, 2030-01-02."
    )
    assert origins([row(threads=1), row()]).count(";") == 1
    assert origins([]) == ""


def test_rows_of_two_models_name_both_runs():
    common = {
        "method": "plain", "saved_bytes": 2**20, "saved_ratio": 1.0, "gradient_error": 0.01,
        "batch_size": 2, "dtype": "float32",
    }  # fmt: skip
    text = families.render([row(model="a", **common), row("def", model="b", **common)])
    assert "commits abc, def" in text


def run_of(name, seed, distance=None, commit="abc", **changes):
    settings = {
        "model": "small_vit", "data": "a set", "train_images": 8, "epochs": 1, "batch_size": 4,
        "autocast": "None", "device": "cpu",
    } | changes.pop("settings", {})  # fmt: skip
    away = {} if distance is None else {"weight_distance": distance}
    values = {
        "name": name, "seed": seed, "epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5,
        "saved_bytes": 2**20, "settings": settings, **away,
    }  # fmt: skip
    return row(commit, **values, **changes)


def test_a_distance_says_over_how_many_seeds_it_is():
    runs = [run_of("plain", seed, 0.0) for seed in range(2)]
    text = parity.render([*runs, run_of("mesa4", 0, 0.25, "def"), run_of("mesa4", 1)])
    assert "| 0.000 |" in text
    assert "| 0.250 (1 of 2 seeds) |" in text
    assert "commits abc, def" in text
    assert "small_vit from scratch" in text


def test_the_number_of_parameters():
    text = parity.render([run_of("plain", 0, parameters=1_234_567)])
    assert "small_vit (1.2 M parameters) from scratch" in text
    # Rows of older runs have no number.
    older = parity.render([run_of("plain", 0, settings={"data": "digits"})])
    assert "small_vit (1.2 M parameters) from scratch" in older


def test_runs_on_two_devices_have_a_table_each():
    runs = [run_of("plain", 0), run_of("plain", 0, settings={"device": "cuda"})]
    assert parity.render(runs).count("| plain |") == 2


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_the_calls_on_dithered_weights_of_attention(bits):
    path = BENCH / "ops.py"
    spec = importlib.util.spec_from_file_location("bench_ops", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    kernels.load()
    torch.manual_seed(0)
    cases = {
        (case.operator, case.variant): case.call()
        for case in bench.softmax_cases(bits, torch.randn(16, 40))
    }
    for operator in ("softmax_backward", "affine_decode"):
        plain = cases[operator, f"attention's weights, {bits} bits"]
        dithered = cases.get((operator, f"attention's weights, {bits} bits, dither"))
        assert (dithered is None) == (bits == 8)
        assert dithered is None or not torch.equal(dithered, plain)
