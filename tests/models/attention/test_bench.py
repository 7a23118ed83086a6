"""The attention benchmark: it has all layers, its counts are exact, and its rows and table are whole."""

import importlib.util
from pathlib import Path

import pytest
import torch

import mesa_train
from mesa_train.models.attention import ATTENTION_LAYERS, create_attention
from mesa_train.utils import records

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts/bench"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPTS / "attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from tables import recipes

    return recipes.attention.render


def test_all_layers_take_part(bench):
    assert {name for _, name, _ in bench.CONTESTANTS} == set(ATTENTION_LAYERS)
    assert len(set(bench.LABELS)) == len(bench.LABELS)


@pytest.mark.parametrize("side", [14, 64])
def test_all_layers_take_both_maps(bench, side):
    for label in bench.LABELS:
        with torch.device("meta"):
            layer, options = bench.build(label, side)
        assert layer.size == (side, side)
        assert "side" not in options.values()
        layer.check_size(side, side)


def test_counts_are_exact(bench):
    row = bench.counted("HiLo", 14, 2)
    layer = torch.nn.Sequential(torch.nn.LayerNorm(768), create_attention("hilo", 768, 12, 14, 14))
    maps = torch.randn(2, 14, 14, 768, requires_grad=True)
    for policy, column in (("plain", "saved_bytes"), ("mesa8", "mesa8_saved_bytes")):
        real = mesa_train.footprint(layer, maps, policy=policy, autocast=torch.bfloat16, fake=False)
        assert row[column] == real.saved_bytes
    assert (row["parameters"], row["macs"]) == (2_198_528, 298_296_320)


def test_rows_and_table_are_whole(bench, table, tmp_path, monkeypatch):
    # Narrow layers: the benchmark runs under bfloat16 autocast, which old processors emulate.
    monkeypatch.setattr(bench, "DIM", 24)
    monkeypatch.setattr(bench, "LABELS", ("MSA", "focal"))
    common = {"batch": 1, "count_batch": 2, "rounds": 3, "device": "cpu"}
    path = tmp_path / "rows.jsonl"
    bench.main(side=[14, 16], counts_only=True, out=path, **common)
    rows = records.read(path)
    assert [(row["layer"], row["side"]) for row in rows] == [
        (label, side) for side in (14, 16) for label in bench.LABELS
    ]
    assert [row["options"] for row in rows if row["layer"] == "focal"] == [
        {"window": 7},
        {"window": 8},
    ]
    assert "Not timed yet" in table(rows)
    assert "| - | - | - |" in table(rows)
    bench.main(side=[14], counts_only=False, out=path, **common)
    rows = records.read(path)
    for row in rows[4:]:
        assert row["mesa8_saved_bytes"] < row["saved_bytes"]
        assert row["forward_ms"] > 0
        assert row["train_ms_low"] <= row["train_ms"] <= row["train_ms_high"]
        assert row["commit"]
    # A later run without times renews the counts and keeps the times.
    bench.main(side=[14], counts_only=True, out=path, **common)
    lines = table(records.read(path)).splitlines()
    assert [line.split(" | ")[3].endswith("ms") for line in lines[2:6]] == [True] * 2 + [False] * 2
