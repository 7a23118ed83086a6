"""The GPU run as its user runs it: from a plain copy, not installed, without optional packages.

The dry run on a CPU takes the same code with small sizes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from limits import HUNG_S

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
# What a machine with PyTorch, Triton, timm, transformers and Accelerate may lack.
MISSING = (
    *("typer", "rich", "datasets", "deepspeed", "bitsandbytes", "sklearn", "mlxtend", "pytest"),
    *("_pytest", "hypothesis", "matplotlib", "lightning", "peft", "mesa_train", "__editable__"),
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with this one's packages, except those in MISSING."""
    home = tmp_path_factory.mktemp("python")
    # A base interpreter's executable: a virtual environment of one that is none itself.
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(MISSING) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return home / "bin/python"


@pytest.fixture
def copied(tmp_path):
    """A plain copy of the repository: no git, no build, no bytecode."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("mesa_train", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "copy" / folder, ignore=ignored)
    return tmp_path / "copy"


def run(python, copied, *arguments):
    """The rows of a dry run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    out = copied.parent / "out"
    done = subprocess.run(
        [python, copied / "scripts/bench/gpu_first_run.py", "--device", "cpu", "--out", out, *arguments],
        cwd=copied.parent, env=environment, capture_output=True, text=True, timeout=HUNG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "gpu_first_run.jsonl").read_text().splitlines()]


def names(copied):
    """The names of all sections, read from the worker's own list."""
    listing = "import gpu_worker; print(*[s.name for s in gpu_worker.sections()], sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", listing],
        cwd=copied / "scripts/bench",
        capture_output=True,
        text=True,
    )
    return done.stdout.split("\n")[:-1]


def outcomes(rows):
    """The last row of every section."""
    return {row["section"]: row for row in rows}


def test_every_section_has_rows_and_none_an_error(python, copied):
    lacks = subprocess.run([python, "-c", "import typer"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in lacks.stderr
    rows = run(python, copied, "--budget", str(HUNG_S))
    assert not [row for row in rows if "error" in row]
    expected = names(copied)
    assert len(expected) > 20
    assert list(outcomes(rows)) == [*expected, "end"]
    for row in rows[:-1]:
        assert {"device", "device_type", "versions", "commit", "sources", "date", "at"} <= set(row)
    ends = outcomes(rows)
    assert {n for n in expected if "skipped" in ends[n]} == {"graph plain", "graph mesa8"}
    assert all(ends[n]["seconds"] >= 0 for n in expected if "skipped" not in ends[n])
    assert all(row["same_output"] for row in rows if "same_output" in row)
    assert all(row["same_loss"] for row in rows if row.get("same_loss") is not None)
    assert {row["package"] for row in rows if "package" in row} == {"copy/mesa_train/__init__.py"}
    checked = [row for row in rows if row["section"] == "operators" and "operator" in row]
    assert all(row["calls"] and row["distance"] < 0.01 for row in checked)
    losses = {row["loss"] for row in rows if row["section"].startswith("step") and "loss" in row}
    assert len(losses) <= 2  # the fused forward rounds in its own way


def test_what_raises_crashes_or_hangs_is_a_row_and_the_rest_goes_on(python, copied):
    checks = copied / "scripts/bench/gpu_checks.py"
    text = checks.read_text()
    for function, breakage in (
        ("environment", "os.kill(os.getpid(), 11)"),
        ("attention", 'raise ValueError("a wrong mask")'),
        ("gradients", "time.sleep(10_000)"),
    ):
        text, found = re.subn(
            rf"(def {function}\(bench: Bench\) -> None:\n)", rf"\1    {breakage}\n", text
        )
        assert found == 1
    checks.write_text(text)
    worker = copied / "scripts/bench/gpu_worker.py"
    shortened = worker.read_text().replace('"gradients", 20', '"gradients", 1')
    worker.write_text(shortened)
    wanted = "environment,attention,step plain,gradients,operators"
    rows = run(python, copied, "--sections", wanted)
    errors = {row["section"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "environment": "the process ended with signal 11",
        "attention": "ValueError: a wrong mask",
        "gradients": "ended after 10 s without a result",
    }
    assert outcomes(rows)["step plain"]["done"]
    assert outcomes(rows)["operators"]["done"]


def test_what_does_not_fit_into_the_budget_is_skipped(python, copied):
    rows = run(python, copied, "--budget", "1")
    assert list(outcomes(rows)) == [*names(copied), "end"]
    assert all("skipped" in row for row in rows[:-1])
