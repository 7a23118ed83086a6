"""The GPU's tables: a prediction without a run, with a run, and the outcome of each section."""

import json

import pytest
from tables.gpu import gpu_sections, gpu_steps

SOURCE = {
    "device": "a GPU", "device_type": "cuda", "threads": 2, "versions": {"torch": "2.15.0"},
    "commit": "abc", "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip
MODEL = {"model": "a_vit", "batch_size": 2, "dtype": "bf16"}
PREDICTION = [
    {
        **MODEL, "method": method, "step_ms": 20.0 * ratio, "step_ratio": ratio, "device": "a GPU",
        "remark": "A model, no run.", "date": "2029-01-01T00:00:00+00:00",
    }
    for method, ratio in (("plain", 1.0), ("mesa8", 1.25))
]  # fmt: skip


def measured(method, step_ms, **values):
    row = {"section": f"step {method}", "method": method, "step_ms": step_ms, "host_ms": 3.0}
    return {**row, "peak_bytes": 3 << 20, **MODEL, **SOURCE, **values}


@pytest.fixture
def results(tmp_path):
    def write(rows):
        for name, lines in (("gpu_prediction", PREDICTION), ("gpu_first_run", rows)):
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (tmp_path / f"{name}.jsonl").write_text(text)
        return tmp_path

    return write


def test_without_a_run_only_the_prediction_has_numbers(results):
    text = gpu_steps.markdown(results([]), [])
    assert "| mesa8 | 25.0 ms | 1.25 | not run yet |  |  |  |  |" in text
    assert "Not run on a GPU yet." in text
    assert "A model, no run." in text


def test_a_run_stands_beside_the_prediction(results):
    rows = [
        measured("plain", 99.0),
        {"section": "step plain", "error": "the process ended with signal 11"},
        measured("plain", 10.0),
        measured("mesa8", 15.0),
        measured("mesa8", 1.0, device_type="cpu"),
        {**measured("mesa8", 1.0), "section": "graph mesa8"},
        {"section": "end"},
    ]
    text = gpu_steps.markdown(results(rows), [])
    assert "| plain | 20.0 ms | 1.00 | 10.0 ms | 1.00 | -50% | 3.0 ms | 3.0 MiB |" in text
    assert "| mesa8 | 25.0 ms | 1.25 | 15.0 ms | 1.50 | +20% | 3.0 ms | 3.0 MiB |" in text
    assert "a GPU, PyTorch 2.15.0, commit abc, 2030-01-02." in text


def test_every_section_of_the_newest_run_has_an_outcome(results):
    rows = [
        {"section": "old", "done": True, "seconds": 1.0, **SOURCE},
        {"section": "end"},
        {"section": "attention", "same_output": True, **SOURCE},
        {"section": "attention", "same_output": False, **SOURCE},
        {"section": "attention", "done": True, "seconds": 2.0, **SOURCE},
        {"section": "profile", "error": "the process ended with signal 11"},
        {"section": "graph", "skipped": "needs a GPU", **SOURCE},
        {"section": "end"},
    ]
    text = gpu_sections.markdown(results(rows), [])
    assert "old" not in text
    assert "| attention | 2 s | no error | 1 of 2 |" in text
    assert "| profile |  | the process ended with signal 11 |  |" in text
    assert "| graph |  | skipped: needs a GPU |  |" in text
