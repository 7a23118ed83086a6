"""The entry points end to end, small: quickstart, parity experiment, benchmark, tables."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from limits import HUNG_S

REPOSITORY = Path(__file__).resolve().parents[2]


def run(script, *arguments, cwd, as_a_user=False):
    """What a call of a script in the repository printed and returned. `as_a_user`: by a process that begins with its
    imports."""
    command = [str(REPOSITORY / script), *map(str, arguments)]
    run_options = {
        "cwd": cwd,
        "env": {**os.environ, "TERM": "dumb", "COLUMNS": "120"},
        "timeout": HUNG_S,
    }
    if as_a_user:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, **run_options
        )
    return forked.run(command, **run_options)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_quickstart_trains_both_and_says_where_the_results_are(tmp_path):
    arguments = ["--data", "digits", "--epochs", 1]
    done = run("recipes/quickstart/train.py", *arguments, cwd=tmp_path, as_a_user=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "quickstart"
    rows = rows_of(out / "metrics.jsonl")
    assert [row["name"] for row in rows] == ["plain", "mesa8"]
    plain, wrapped = rows
    assert wrapped["saved_bytes"] < plain["saved_bytes"] / 2.5
    # One epoch from the same start: what 8-bit codes change is far below what training changes.
    assert wrapped["train_loss"] == pytest.approx(plain["train_loss"], rel=0.01)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/quickstart/curves.png" in done.stdout
    assert "Summary" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--polcy", "mesa8"], "--policy"),
        (["--policy", "mesa9"], "mesa8"),
        (["--model", "no_such_vit"], "no model 'no_such_vit'"),
        (["--batch-size", "5000"], "batch_size=5000"),
    ],
)
def test_quickstart_refuses_mistakes_in_a_line(tmp_path, arguments, message):
    done = run("recipes/quickstart/train.py", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_parity_resumes_and_is_drawn(tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "parity.png"
    arguments = ["--data", "digits", "--epochs", 1, "--float32", "--out", rows]
    pair = [*arguments, "--state", tmp_path / "state", "--policies", "plain,mesa4"]
    first = run("scripts/bench/train_parity.py", *pair, "--seeds", "0", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    repeated = run("scripts/bench/train_parity.py", *pair, "--seeds", "0,1", cwd=tmp_path)
    assert "2 runs to do, 2 done before" in repeated.stdout
    runs = [(row["name"], row["seed"]) for row in rows_of(rows)]
    assert runs == [("plain", 0), ("mesa4", 0), ("plain", 1), ("mesa4", 1)]
    plotted = run("scripts/bench/plot_parity.py", rows, picture, cwd=tmp_path)
    assert plotted.returncode == 0, plotted.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    missing = run("scripts/bench/plot_parity.py", rows, picture, "--data", "mnist5k", cwd=tmp_path)
    assert missing.returncode != 0
    assert "no rows of data mnist5k" in missing.stderr


def parity(folder, *arguments):
    """The command of a small parity experiment whose files are in `folder`."""
    small = [
        "--data",
        "digits",
        "--train-images",
        96,
        "--batch-size",
        32,
        "--float32",
        "--seeds",
        0,
    ]
    files = ["--out", folder / "rows.jsonl", "--state", folder / "state"]
    command = [sys.executable, REPOSITORY / "scripts/bench/train_parity.py", *small, *files]
    return list(map(str, [*command, *arguments]))


def results(folder):
    """What the rows of an experiment say, without times and dates."""
    names = ("train_loss", "val_loss", "val_accuracy", "lr", "weight_distance", "parameters")
    return {
        (row["name"], row["epoch"]): [row.get(name) for name in names]
        for row in rows_of(folder / "rows.jsonl")
    }


@pytest.mark.slow
def test_a_killed_parity_experiment_goes_on_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Three steps an epoch, dithered codes, and the running ranges of the paper.
    options = ["--epochs", 3, "--policies", "plain,mesa4,paper"]
    subprocess.run(parity(whole, *options), check=True, timeout=HUNG_S, capture_output=True)
    process = subprocess.Popen(parity(cut, *options), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + HUNG_S
    while not list(cut.glob("state/*/epoch-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cut / "rows.jsonl").exists()
    assert list(cut.glob("state/*/epoch-*.pt"))
    again = subprocess.run(
        parity(cut, *options), check=True, timeout=HUNG_S, capture_output=True, text=True
    )
    # The first epoch of each is in the checkpoint.
    assert "plain              epoch   1" not in again.stdout
    assert "plain              epoch   3" in again.stdout
    expected = results(whole)
    assert list(expected) == [(n, e) for e in (1, 2, 3) for n in ("plain", "mesa4", "paper")]
    assert results(cut) == expected
    assert expected["plain", 3][-2] == 0 < expected["mesa4", 3][-2] < 1
    assert not list(cut.glob("state/*/epoch-*.pt"))


@pytest.mark.slow
def test_distance_from_a_plain_run_of_an_earlier_call(tmp_path):
    once, apart = tmp_path / "once", tmp_path / "apart"

    def trained(folder, *arguments):
        command = parity(folder, "--epochs", 1, *arguments)[1:]
        done = forked.run(command, timeout=HUNG_S, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    trained(once, "--policies", "plain,mesa4")
    assert "no distance" not in trained(apart, "--policies", "plain")
    assert "no distance" not in trained(apart, "--policies", "plain,mesa4")
    assert results(apart) == results(once)
    assert results(once)["mesa4", 1][-2] > 0
    text = trained(apart, "--policies", "mesa8", "--state", tmp_path / "empty")
    assert "rows of seed 0 have no distance of the weights" in text
    assert results(apart)["mesa8", 1][-2] is None


@pytest.mark.slow
def test_parity_refuses_a_device_in_a_line(tmp_path):
    done = forked.run(parity(tmp_path, "--device", "gpu")[1:], timeout=HUNG_S)
    assert done.returncode != 0
    assert done.stderr.strip() == "train_parity: unknown device 'gpu'; choose from cpu, cuda"


@pytest.mark.slow
def test_benchmark_writes_complete_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run(
        "scripts/bench/step.py", "--quick", "--models", "test_vit", "--batch-size", 2,
        "--methods", "mesa8,checkpoint,save_on_cpu", "--out", out, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in rows_of(out)}
    assert list(rows) == ["plain", "mesa8", "checkpoint", "save_on_cpu"]
    assert rows["plain"]["step_ratio"] == 1
    assert rows["checkpoint"]["gradient_error"] == pytest.approx(rows["plain"]["gradient_error"])
    for row in rows.values():
        assert len(row["times_ms"]) == row["rounds"] == 3
        assert {"device", "versions", "commit", "threads", "date", "command"} <= set(row)


@pytest.fixture
def make_tables(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts/bench")
    path = REPOSITORY / "scripts/bench/make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STEP_ROW = {
    "model": "a_vit", "method": "plain", "batch_size": 2, "dtype": "bf16", "rounds": 3,
    "saved_bytes": 2**20, "saved_ratio": 1.0, "gradient_error": 0.0123, "step_ms": 41.6,
    "step_ratio": 1.0, "step_ratio_quartiles": [1.0, 1.0], "peak_bytes": 2**21,
    "largest_batch": 9, "device": "a CPU",
    "device_type": "cpu", "threads": 2, "versions": {"torch": "2.15.0"}, "commit": "abc",
    "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip


def test_tables_are_made_of_the_newest_rows_and_checked(tmp_path, make_tables):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:step a_vit -->\nold\n<!-- /table -->\nafter\n")
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    older = {**STEP_ROW, "step_ms": 99.0, "date": "2029-01-01T00:00:00+00:00"}
    lossy = {**STEP_ROW, "method": "checkpoint", "note": "has no blocks"}
    lines = [json.dumps(row) for row in (older, STEP_ROW, lossy)]
    (results / "bench_step.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match=r"README\.md differ"):
        make_tables.main(check=True, root=tmp_path)
    make_tables.main(check=False, root=tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:step a_vit -->\n| method |")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "| plain | 1.0 MiB | 1.00x | 2.0 MiB | 1.23% | 42 ms | 1.00 (1.00 to 1.00) | 9 |" in text
    assert "| checkpoint | has no blocks |" in text
    assert "99 ms" not in text
    assert "a CPU, 2 threads, PyTorch 2.15.0, commit abc, 2030-01-02." in text
    make_tables.main(check=True, root=tmp_path)


def test_rows_of_one_dtype(tmp_path, make_tables):
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    lines = [
        json.dumps({**STEP_ROW, "dtype": dtype, "step_ratio": ratio, "arithmetic": "AVX2"})
        for dtype, ratio in (("bf16", 1.25), ("float32", 1.5))
    ]
    (results / "bench_step.jsonl").write_text("\n".join(lines) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:step a_vit float32 -->\n<!-- /table -->\n")
    make_tables.main(check=False, root=tmp_path)
    text = readme.read_text()
    assert "1.50 (" in text
    assert "1.25 (" not in text
    assert "a CPU (AVX2), 2 threads" in text


def test_a_run_without_times_keeps_the_times_of_equal_bytes(tmp_path, make_tables):
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    other = {**STEP_ROW, "method": "mesa4", "step_ms": 50.0}
    later = {"date": "2031-01-01T00:00:00+00:00", "device": "slow CPU"}
    new = [
        {k: v for k, v in row.items() if not k.startswith("step_")}
        | {**later, "gradient_error": 0.05, "saved_bytes": saved}
        for row, saved in ((STEP_ROW, 2**20), (other, 2**20 + 1))
    ]
    shapes = {"shapes": [[2, 3, 224, 224]]}
    lines = [json.dumps(row | shapes) for row in (STEP_ROW, other, *new)]
    (results / "bench_step.jsonl").write_text("\n".join(lines) + "\n")
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    readme.write_text("<!-- table:step a_vit -->\n<!-- /table -->\n")
    page.write_text("<!-- table:steps cpu bf16 -->\n<!-- /table -->\n")
    make_tables.main(check=False, root=tmp_path)
    text = readme.read_text()
    assert "| plain | 1.0 MiB | 1.00x | 2.0 MiB | 5.00% | 42 ms | 1.00 (1.00 to 1.00) | 9 |" in text
    assert "| mesa4 | 1.0 MiB | 1.00x | 2.0 MiB | 5.00% | not timed |  | 9 |" in text
    assert "Times: a CPU, 2 threads, PyTorch 2.15.0, commit abc, 2030-01-02." in text
    # A table of times names the machine that took them.
    assert "| a_vit | 2 x 224 px |" in page.read_text()
    assert "slow CPU" not in page.read_text()
    page.unlink()
    (results / "bench_step.jsonl").write_text("\n".join(lines[2:]) + "\n")
    make_tables.main(check=False, root=tmp_path)
    assert "| plain | 1.0 MiB | 1.00x | 2.0 MiB | 5.00% | not timed |" in readme.read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<!-- table:stp x -->\n<!-- /table -->", "no table 'stp'"),
        ("<!-- table:step -->\n<!-- /table -->", "takes a model and optionally a dtype, got none"),
        ("<!-- table:step x bf16 y -->\n<!-- /table -->", "optionally a dtype, got x bf16 y"),
        ("<!-- table:vit22b_kept x -->\n<!-- /table -->", "'vit22b_kept' takes no words, got x"),
        ("<!-- table:step x -->\n", "not closed"),
    ],
)
def test_a_wrong_marker_is_named(tmp_path, make_tables, body, message):
    (tmp_path / "README.md").write_text(body)
    with pytest.raises(SystemExit, match=rf"README\.md: .*{message}"):
        make_tables.main(check=False, root=tmp_path)
