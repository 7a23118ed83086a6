"""The host's share of a step, as counts: Python calls and operators. Counts are exact, times are not."""

import json
import subprocess
import sys
from pathlib import Path

import host
import pytest

from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.utils import records

SCRIPT = Path(host.__file__)


@pytest.fixture(scope="module", autouse=True)
def _extension():
    native.prepare(CompressionMode)
    if native.extension is None:
        pytest.skip("no compiler, or MESA_TRAIN_NATIVE=0")


COUNT = """
import contextlib, json, sys
import host
from mesa_train import PRESETS

def counts(step):
    step()
    step()
    return host.python_calls_of(step), host.operators_of(step)

methods = ["plain", *[p for p in PRESETS if p != "paper"]]
found = {f"{n} {m}": counts(host.step_of(host.MODELS[n], m)) for n in host.MODELS for m in methods}
found["functional"] = counts(host.functional_step(contextlib.nullcontext))
found["compress"] = counts(host.functional_step(lambda: host.compress("mesa8")))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts():
    """(Python calls, operators) of each warm step, in a process that no other test has changed."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=SCRIPT.parent, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# The upper bounds: the counts of a step divided by plain's.
@pytest.mark.parametrize(
    ("model", "method", "calls", "operators"),
    [
        ("vit", "mesa8", 1.40, 1.15),
        ("vit", "mesa4", 1.40, 1.15),
        ("vit", "mesa8-recompute", 1.50, 1.15),
        ("vit", "mesa4-recompute", 1.50, 1.15),
        ("vit", "lossless", 1.75, 1.50),
        ("swin", "mesa8", 2.0, 1.20),
        ("swin", "mesa8-recompute", 3.1, 1.34),  # masks, and attention that is rebuilt
        ("swin", "lossless", 2.1, 1.45),
    ],
)
def test_a_step_makes_few_calls(counts, model, method, calls, operators):
    found, plain = counts[f"{model} {method}"], counts[f"{model} plain"]
    assert found[0] <= calls * plain[0]
    assert found[1] <= operators * plain[1]


def test_functional_code_makes_few_calls(counts):
    plain, found = counts["functional"], counts["compress"]
    # Every torch call of functional code goes through one Python function of the mode.
    assert found[0] - plain[0] <= 150 * 12
    assert found[1] <= 1.2 * plain[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", host.PATHS)
def test_the_script(tmp_path, path):
    rows = tmp_path / "rows.jsonl"
    options = ["--quick", "--models", "vit", "--paths", path, "--methods", "plain,mesa8,compress"]
    subprocess.run(
        [sys.executable, SCRIPT, *options, "--out", rows], check=True, capture_output=True
    )
    found = records.read(rows)
    assert [row["method"] for row in found] == ["plain", "mesa8", "functional", "compress"]
    assert all(row["path"] == path and row["step_ms"] > 0 for row in found)
    assert [row["ratio"] for row in found if row["method"] in ("plain", "functional")] == [1, 1]


def test_a_mistyped_method_is_one_line():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--methods", "mesa9"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("host: --methods has 'mesa9'; choose from plain, ")
