"""Rows survive a round trip, interrupted writes included, and say where they came from."""

import json

import pytest

from mesa_train.report.columns import in_order
from mesa_train.utils import records


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "and newer" / "rows.jsonl"
    assert records.read(path) == []
    records.append(path, {"a": 1}, {"b": [1.5, None]})
    records.append(path, {"c": "x̂"})
    assert records.read(path) == [{"a": 1}, {"b": [1.5, None]}, {"c": "x̂"}]


def test_a_line_cut_short_is_left_out_and_then_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert records.read(path) == [{"a": 1}]
    records.append(path, {"c": 3})
    assert records.read(path) == [{"a": 1}, {"c": 3}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not JSON"):
        records.read(path)


def test_provenance_is_complete_and_serialisable():
    source = records.provenance()
    assert {"device", "device_type", "threads", "cpus", "versions", "commit", "date"} <= set(source)
    assert {"python", "mesa_train", "torch"} <= set(source["versions"])
    assert json.loads(json.dumps(source)) == source


def test_group_by_keeps_order():
    rows = [{"k": "b", "i": 0}, {"k": "a", "i": 1}, {"k": "b", "i": 2}]
    groups = records.group_by(rows, "k")
    assert list(groups) == [("b",), ("a",)]
    assert [row["i"] for row in groups["b",]] == [0, 2]


def test_in_order_puts_plain_first_and_presets_as_listed():
    rows = [
        {"name": n, "i": i} for i, n in enumerate(["other", "paper", "mesa8", "plain", "mesa8"])
    ]
    names = [row["name"] for row in in_order(rows)]
    assert names == ["plain", "mesa8", "mesa8", "paper", "other"]
    assert [row["i"] for row in in_order(rows) if row["name"] == "mesa8"] == [2, 4]


def test_columns_of_before_have_their_names_of_today(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kept_bytes": 3, "name": "kept_bytes", "predicted": [{"moved_bytes": 1}]}\n')
    assert records.read(path) == [
        {"saved_bytes": 3, "name": "kept_bytes", "predicted": [{"offloaded_bytes": 1}]}
    ]
