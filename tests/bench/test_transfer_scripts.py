"""Rows and tables of the evaluation of two models, and of segmentation on fractions of the data."""

import json

import data_fractions
import evaluation
import pytest
from tables import transfer

from mesa_train.utils import records


def report():
    """A report of two models; only the second has a classifier of its own."""

    def line(task, metric, value):
        return {
            "task": task,
            "data": "x",
            "metric": metric,
            "value": value,
            "share": True,
            "note": "",
        }

    about = {
        "training images": "9 of x/train", "held-out images": "3 of x/held_out", "device": "a processor",
        "versions": "torch 2", "commit": "abc", "date": "2026-01-02T03:04", "command": "python /home/x",
        "image size": "28 pixels",
    }  # fmt: skip
    first = [line("knn", "k = 10", 0.5), line("probe", "top-1 accuracy", 0.75)]
    second = [line("probe", "top-1 accuracy", 0.25), line("knn", "k = 10", None),
              line("probe", "top-1 of the model's classifier", 0.125)]  # fmt: skip
    return {"models": [{"about": {"model": "a", **about}, "rows": first},
                       {"about": {"model": "b", **about}, "rows": second}]}  # fmt: skip


def test_a_report_of_two_models_becomes_a_row_and_a_table(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report()))
    evaluation.main(tmp_path / "report.json", out=tmp_path / "evaluation.jsonl")
    text = (tmp_path / "evaluation.jsonl").read_text()
    assert "/home/x" not in text  # a command has paths of a machine
    lines = transfer.evaluation.markdown(tmp_path, []).splitlines()
    assert lines[0] == "|  | `a`, 28 pixels | `b`, 28 pixels |"
    assert lines[2:5] == [
        "| probe: top-1 accuracy | 75.0 % | 25.0 % |",
        "| knn: k = 10 | 50.0 % | - |",
        "| its own classifier: top-1 accuracy | - | 12.5 % |",
    ]
    assert "9 of x/train and 3 of x/held_out" in lines[-1]
    assert "commit abc, 2026-01-02." in lines[-1]


@pytest.mark.parametrize("text", ["no JSON", '{"about": {}, "rows": []}'])
def test_a_report_of_one_model_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(SystemExit, match=r"report.json is no report of several models"):
        evaluation.main(tmp_path / "report.json", out=tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_table_of_fractions_has_the_newest_row_of_each():
    row = {
        "file": "q.yaml", "policy": "mesa8", "seed": 0, "pictures": 20, "steps": 160, "mean_iou": 0.1,
        "pixel_accuracy": 0.4, "mean_iou_of_commonest": 0.04, **records.provenance(),
    }  # fmt: skip
    rows = [{**row, "fraction": 1.0, "mean_iou": 0.2}, {**row, "fraction": 0.0625},
            {**row, "fraction": 1.0, "mean_iou": 0.3}]  # fmt: skip
    lines = transfer.data_fractions.render(rows).splitlines()
    assert lines[2:4] == [
        "| 1/16 | 20 | 160 | 10.0 % | 40.0 % |",
        "| 1 | 20 | 160 | 30.0 % | 40.0 % |",
    ]
    assert "The commonest class everywhere: 4.0 %." in lines[-1]


@pytest.mark.slow
def test_fractions_are_trained_for_the_same_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data_fractions.main(
        fractions="0.25,1", changes="data.pictures=32 train.epochs=2 model.channels=8",
        work=tmp_path / "work", out=tmp_path / "rows.jsonl",
    )  # fmt: skip
    rows = records.read(tmp_path / "rows.jsonl")
    assert [(r["pictures"], r["steps"]) for r in rows] == [(8, 8), (32, 8)]
    assert rows[0]["mean_iou"] != rows[1]["mean_iou"]
    assert all(r["processor_s"] > 0 for r in rows)
