"""The attention benchmark: its contestants do the work they are said to do, and its rows are whole."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mesa_train.utils import records


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[3] / "scripts/bench/attention.py"
    spec = importlib.util.spec_from_file_location("bench_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameters_and_work_are_the_published_ones(bench):
    # Millions, at 14x14 tokens. Published counts of spatial reduction include its norm and biases.
    published = {
        "HiLo": (2.20, 298.30),
        "MSA": (2.36, 521.43),
        "windows": (2.36, 477.17),
        "shifted windows": (2.36, 477.17),
        "spatial reduction": (4.72, 419.56),
    }
    layers = bench.layers(14)
    assert list(layers) == list(published)
    for name, (parameters, work) in published.items():
        result = sum(p.numel() for p in layers[name].parameters()) / 1e6
        assert result == pytest.approx(parameters, abs=0.01), name
        assert layers[name].flops(14, 14) / 1e6 == pytest.approx(work, abs=0.3), name


def test_maps_keep_their_shape(bench):
    maps = torch.randn(1, 16, 16, bench.DIM)
    for name, layer in bench.layers(16).items():
        assert layer(maps).shape == maps.shape, name


def test_rows_are_whole(bench, tmp_path, monkeypatch):
    # An eighth of the width: the benchmark runs under bfloat16 autocast, which old processors emulate.
    monkeypatch.setattr(bench, "DIM", 96)
    bench.main(side=14, batch=1, count_batch=2, rounds=3, device="cpu", out=tmp_path / "rows.jsonl")
    rows = records.read(tmp_path / "rows.jsonl")
    assert [row["layer"] for row in rows] == list(bench.layers(14))
    for row in rows:
        assert row["mesa8_saved_bytes"] < row["saved_bytes"] / 2
        assert row["forward_ms"] > 0
        assert row["train_ms_low"] <= row["train_ms"] <= row["train_ms_high"]
        assert row["commit"]
