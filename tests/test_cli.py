"""The command line: tables that fit, JSON alone on stdout, and one line for every wrong request."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mesa_train.cli import DEFAULT_METHODS, app

VIT = ["vit_tiny_patch16_224", "--batch-size", "2", "--image-size", "64"]


def run(*arguments, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(arguments))


def test_compare_in_a_terminal():
    result = run("compare", *VIT, "--methods", "plain,mesa8", "--rounds", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "bf16 autocast" in lines[0]
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout
    (mesa8,) = [line.split() for line in lines if line.strip().startswith("mesa8")]
    assert mesa8[2] == "MiB"
    assert float(mesa8[3].rstrip("x")) > 2.5
    assert mesa8[4].endswith("%")
    assert mesa8[6] == "ms"


def test_compare_json_is_json_alone():
    result = run("compare", *VIT, "--fake", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["inputs"] == [[2, 3, 64, 64]]
    assert [row["method"] for row in found["rows"]] == DEFAULT_METHODS.split(",")
    plain, mesa8 = (row["saved_bytes"] for row in found["rows"][:2])
    assert plain > 2.5 * mesa8
    assert found["rows"][0]["time_ms"] is None


@pytest.mark.parametrize("columns", [80, 120])
def test_profile_in_a_terminal(columns):
    result = run("profile", *VIT, "--fake", columns=columns)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= columns
    for text in ("scaled_dot_product_attention", "kept for backward", "0-11  x12", "└ head"):
        assert text in result.stdout
    assert "…" not in result.stdout
    shallow = run("profile", *VIT, "--fake", "--depth", "1")
    assert "attn" not in shallow.stdout


def test_profile_with_a_policy_from_a_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("preset: mesa4\nmin_bytes: 0\n")
    result = run("profile", *VIT, "--fake", "--json", "--policy", str(path))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["with_policy"]["saved_bytes"] < found["plain"]["saved_bytes"] / 4


@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_dtypes(dtype):
    result = run("compare", *VIT, "--fake", "--json", "--dtype", dtype, "--methods", "plain")
    assert json.loads(result.stdout)["dtype"] == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "vit_smal_patch16_224"], "close names: vit_small_patch16_224"),
        (["compare", "foo:bar"], "unknown scheme 'foo'"),
        (["compare", *VIT, "--methods", "plain,mesa9"], "unknown method 'mesa9'"),
        (["compare", *VIT, "--methods", ","], "needs a method"),
        (["compare", *VIT, "--device", "tpu"], "--device must be cpu or cuda"),
        (["compare", "torchvision:vit_b_16", "--image-size", "225"], "images of 225x225"),
        (["profile", *VIT, "--policy", "mesa9"], "unknown method 'mesa9'"),
        (["profile", *VIT, "--policy", "no_such_file.yaml"], "no_such_file.yaml"),
    ],
)
def test_one_line_for_a_wrong_request(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_as_a_module():
    command = [sys.executable, "-m", "mesa_train.cli", "compare", *VIT, "--fake", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "vit_tiny_patch16_224"


def test_help():
    assert run("--help").exit_code == 0
    assert "--batch-size" in run("compare", "--help").stdout
