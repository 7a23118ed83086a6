"""`mesa-train plan` with a profile on disk: the same plan without a measurement, and clear errors."""

import json

import pytest
from typer.testing import CliRunner

from mesa_train.cli import app
from mesa_train.planner.planner import Planner

pytest.importorskip("highspy")

MLP = """
import torch
from torch import nn

def build(batch_size):
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(batch_size, 64)
"""
SIZE = ["--batch-size", "256"]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", "python:an_mlp.build", *arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "an_mlp.py").write_text(MLP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def measured(folder):
    """The JSON of a plan that was measured, and its profile in mlp.json."""
    result = run(*SIZE, "--fake", "--dtype", "bf16", "--save-profile", "mlp.json", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_plan_of_a_saved_profile_is_the_measured_plan(measured, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a plan from a profile measures nothing")

    monkeypatch.setattr(Planner, "of", fail)
    result = run(*SIZE, "--profile", "mlp.json", "--json")
    assert result.exit_code == 0, result.output
    loaded = json.loads(result.stdout)
    assert loaded["policy"] == measured["policy"]
    assert loaded["plain"] == measured["plain"]
    assert loaded["dtype"] == "bf16"
    assert loaded["prediction"]["saved_bytes"] == measured["prediction"]["saved_bytes"]
    displayed = run(*SIZE, "--profile", "mlp.json")
    assert "256x64" in displayed.stdout.splitlines()[0]
    assert "bf16 autocast" in displayed.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--profile other.json: no such file"),
        ("{}", "--profile other.json is not a profile of this version: no field 'version'"),
        ('{"version": 0}', "its version is 0, expected 2"),
        ("not JSON", "--profile other.json is not a profile of this version"),
        ("[1, 2]", "--profile other.json is not a profile of this version"),
    ],
)
def test_a_file_that_is_not_a_profile_is_one_line(folder, text, message):
    if text is not None:
        (folder / "other.json").write_text(text)
    result = run(*SIZE, "--profile", "other.json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--batch-size", "128"],
            "the profile is of python:an_mlp.build with 256x64, not of python:an_mlp.build with 128x64",
        ),
        ([*SIZE, "--dtype", "float32"], "measured with --dtype bf16, not with float32"),
        ([*SIZE, "--save-profile", "new.json"], "leave --profile out"),
    ],
)
def test_a_profile_of_another_measurement_is_one_line(measured, options, message):
    result = run(*options, "--profile", "mlp.json")
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_a_profile_of_the_library_names_no_model(measured, folder):
    path = folder / "mlp.json"
    fields = json.loads(path.read_text())
    del fields["source"]["setting"]
    path.write_text(json.dumps(fields))
    result = run(*SIZE, "--profile", "mlp.json")
    assert result.exit_code == 2
    assert "the file does not name its model" in result.stderr
