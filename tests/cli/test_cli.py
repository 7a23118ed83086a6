"""The command line: tables that fit, and JSON alone on stdout."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import VIT, run

from mesa_train.cli.compare import _stoppable
from mesa_train.utils.precision import choose

SHALLOW = """
import timm, torch

def build(batch_size):
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=10)
    return model, torch.randn(batch_size, 3, 96, 96)
"""


MLP = """
import torch
from torch import nn

def build(batch_size):
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(batch_size, 64)
"""


@pytest.fixture
def shallow(tmp_path, monkeypatch):
    """Arguments that name a ViT of two blocks with a batch of 32."""
    (tmp_path / "shallow_vit.py").write_text(SHALLOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return ["python:shallow_vit.build", "--batch-size", "32"]


@pytest.mark.slow
def test_compare_in_a_terminal(tmp_path, shallow):
    pytest.importorskip("matplotlib")
    options = ["--methods", "plain,mesa8,vit_has_no_such.yaml"]
    assert run("compare", *shallow, *options).exit_code == 2
    policy = tmp_path / "mine.yaml"
    policy.write_text("preset: mesa4\n")
    options = ["--methods", f"plain,mesa8,{policy}", "--rounds", "2", "--memory", "1GiB"]
    size = [shallow[0], "--batch-size", "4"]
    result = run("compare", *size, *options, "--out", str(tmp_path / "out"), columns=100)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    arithmetic = "bf16 autocast" if choose("auto", "cpu").name == "bf16" else "float32"
    assert arithmetic in lines[0]
    assert max(map(len, lines)) <= 100
    (plain, mesa8) = [line.split() for line in lines if line.strip().startswith(("plain", "mesa8"))]
    assert mesa8[2] == plain[2] == "MiB"
    assert float(plain[1]) > 2.5 * float(mesa8[1])
    assert mesa8[3].endswith("x")
    assert mesa8[6].endswith("%")
    assert int(mesa8[-1].replace(",", "")) > int(plain[-1].replace(",", ""))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"rows.jsonl", "compare.png", "where.png", "report.html"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["plain", "mesa8", str(policy)]
    assert rows[0]["versions"]["torch"]
    assert rows[2]["saved_bytes"] < rows[1]["saved_bytes"]


@pytest.mark.slow
def test_compare_json_is_json_alone(shallow):
    options = "plain,float32,bf16,mesa8,checkpoint,mesa8+checkpoint,mesa8+offload,plain+adamw8bit"
    result = run("compare", *shallow, "--fake", "--json", "--methods", options)
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output["inputs"] == [[32, 3, 96, 96]]
    rows = {row["method"]: row for row in output["rows"]}
    assert list(rows) == options.split(",")
    assert rows["plain"]["saved_bytes"] > 2.5 * rows["mesa8"]["saved_bytes"]
    assert rows["bf16"]["weight_bytes"] * 2 == rows["plain"]["weight_bytes"]
    assert rows["plain+adamw8bit"]["optimizer_bytes"] < rows["plain"]["optimizer_bytes"] / 3
    assert "step_ms" not in rows["plain"]
    offloaded = rows["mesa8+offload"]
    assert offloaded["saved_bytes"] + offloaded["offloaded_bytes"] == rows["mesa8"]["saved_bytes"]
    assert rows["mesa8"]["offloaded_bytes"] is None


def test_compare_says_what_quick_cannot(shallow):
    result = run("compare", *shallow, "--fake", "--methods", "plain,compile", "--memory", "1GiB")
    assert "compile: only a real run can count its bytes" in result.stdout


def test_profile_in_a_terminal():
    result = run("profile", *VIT, "--fake")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for text in ("scaled_dot_product_attention", "saved for backward", "0-11  x12", "└ head"):
        assert text in result.stdout
    assert "…" not in result.stdout


def test_profile_in_a_wide_terminal(shallow):
    result = run("profile", *shallow, "--fake", columns=120)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 120
    for text in ("scaled_dot_product_attention", "saved for backward", "0-1  x2", "└ head", "attn"):
        assert text in result.stdout
    assert "…" not in result.stdout
    assert "Saved tensors of mesa8, and how they are stored:" in result.stdout
    assert "8 bits in groups of 128, nearest" in result.stdout
    assert "rebuilt" in result.stdout


def test_profile_of_one_level(shallow):
    result = run("profile", *shallow, "--fake", "--depth", "1")
    assert "blocks" in result.stdout
    assert "attn" not in result.stdout


def test_profile_with_a_policy_from_a_file(tmp_path, shallow):
    path = tmp_path / "policy.yaml"
    path.write_text("preset: mesa4\nmin_bytes: 0\n")
    result = run("profile", *shallow, "--fake", "--json", "--policy", str(path))
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output["with_policy"]["saved_bytes"] < output["plain"]["saved_bytes"] / 4
    assert output["flops"]["total"] > 2 * 32 * 10 * output["plain"]["parameter_bytes"] / 4
    assert output["flops"]["by_module"]["head"] == 2 * 32 * 192 * 10


ECOFORMER = """
import mesa_train.models, timm

def build():
    return timm.create_model("ecoformer_pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=10)
"""


def test_profile_of_an_ecoformer_has_energy(tmp_path):
    (tmp_path / "eco.py").write_text(ECOFORMER)
    model = [f"python:{tmp_path}/eco.py:build", "--fake", "--image-size", "96"]
    result = run("profile", *model, "--depth", "0", "--batch-size", "1")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    lines = [line.split() for line in result.stdout.splitlines()]
    (total,) = [line for line in lines if line[:1] == ["total"]]
    multiplications, additions, millijoules = map(float, total[1:])
    # The printed values are rounded to three digits.
    assert abs(3.7 * multiplications + 0.9 * additions - millijoules) < 4e-3
    energy = json.loads(run("profile", *model, "--json").stdout)["energy"]
    assert energy["pj"] == sum(part["pj"] for part in energy["parts"].values())
    assert list(energy["parts"]) == ["stage 1", "stage 2", "stage 3", "stage 4", "head"]


def test_profile_of_two_policies(shallow):
    result = run("profile", *shallow, "--fake", "--policy", "mesa8", "--diff", "mesa4")
    assert result.exit_code == 0, result.output
    head = next(line for line in result.stdout.splitlines() if "operator" in line)
    assert head.split() == ["operator", "mesa8", "share", "mesa4", "less"]
    output = json.loads(run("profile", *shallow, "--fake", "--diff", "mesa4", "--json").stdout)
    assert output["with_policy"]["saved_bytes"] > 1.2 * output["with_diff"]["saved_bytes"]
    assert output["with_diff"]["stored"]


def test_profile_beyond_this_machine(shallow):
    model = [shallow[0], "--batch-size", "1000000"]
    output = json.loads(run("profile", *model, "--fake", "--json").stdout)
    assert output["plain"]["saved_bytes"] > 500 * 2**30


@pytest.mark.slow
def test_plan(tmp_path, shallow):
    pytest.importorskip("highspy")
    # More is chosen between under autocast; no arithmetic is done.
    size = [*shallow, "--fake", "--dtype", "bf16"]
    policy, chart = tmp_path / "plan.yaml", tmp_path / "frontier.png"
    output = run("plan", *size, "--json", "--frontier", str(chart))
    smallest = json.loads(output.stdout)
    low, high = (smallest[of]["peak_bytes"] for of in ("prediction", "plain"))
    assert low < high
    assert len(smallest["frontier"]) > 3
    assert chart.stat().st_size > 10_000
    budget = (low + high) // 2
    result = run("plan", *size, "--budget", str(budget), "--out", str(policy))
    assert result.exit_code == 0, result.output
    assert "peak of the step" in result.stdout
    actual = json.loads(run("profile", *size, "--policy", str(policy), "--json").stdout)
    assert actual["with_policy"]["saved_bytes"] > smallest["prediction"]["saved_bytes"]
    assert actual["with_policy"]["saved_bytes"] < smallest["plain"]["saved_bytes"]


def test_a_budget_below_every_plan(tmp_path, monkeypatch):
    pytest.importorskip("highspy")
    (tmp_path / "an_mlp.py").write_text(MLP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = run("plan", "python:an_mlp.build", "--batch-size", "256", "--fake", "--budget", "1KiB")
    assert result.exit_code == 2
    assert "the smallest possible peak is" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_estimate(tmp_path, shallow):
    path = tmp_path / "accelerate.yaml"
    size = [*shallow, "--policies", "plain,mesa8"]
    options = ["--gpus", "8", "--gpu-memory", "2.1GiB", "--out", str(path)]
    result = run("estimate", *size, *options)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.partition("The simplest")[0].splitlines())) <= 80
    assert f"accelerate launch --config_file {path}" in result.stdout
    assert "num_processes: 8" in path.read_text()
    output = json.loads(run("estimate", *size, *options, "--json").stdout)
    assert output["chosen"]["fits"]
    none = run("estimate", *size, "--gpu-memory", "2.001GiB")
    assert "do not fit" in none.stdout or "one image a GPU does not fit" in none.stdout


USERS_MODEL = """
import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Conv2d(3, 64, 8, 8), nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(2)
        )

    def forward(self, pixels, tokens, mask=None):
        x = torch.cat([self.image(pixels).flatten(2).mT, self.text(tokens)], 1)
        for block in self.blocks:
            x = block(x)
        return {"features": x}


def build(batch_size, image_size=64):
    model = Pair()
    pixels = torch.randn(batch_size, 3, image_size, image_size)
    return model, {"pixels": pixels, "tokens": torch.randint(0, 50, (batch_size, 12))}
"""


@pytest.mark.slow
def test_a_model_of_their_own(tmp_path, monkeypatch):
    """A file with a factory: a dict of two inputs, of the size asked for."""
    (tmp_path / "users_model.py").write_text(USERS_MODEL)
    monkeypatch.chdir(tmp_path)
    name = ["python:users_model.build", "--batch-size", "6", "--image-size", "96"]
    output = json.loads(run("compare", *name, "--fake", "--json").stdout)
    assert output["inputs"] == [[6, 3, 96, 96], [6, 12]]
    rows = {row["method"]: row for row in output["rows"]}
    assert rows["mesa8"]["saved_bytes"] < rows["plain"]["saved_bytes"] / 2
    options = ["--methods", "plain,mesa8"]
    limit = ["--fake", "--json", "--memory", "1GiB"]
    fitting = json.loads(run("compare", *name, *options, *limit).stdout)["rows"]
    assert fitting[1]["largest_batch"] > fitting[0]["largest_batch"]
    options += ["--rounds", "1"]
    real = json.loads(run("compare", *name, *options, "--json").stdout)["rows"]
    assert [row.get("note") for row in real] == [None, None]
    assert [row["saved_bytes"] for row in real] == [
        rows[m]["saved_bytes"] for m in ("plain", "mesa8")
    ]
    assert real[1]["gradient_error"] < 0.05
    planned = json.loads(run("plan", *name, "--json").stdout)
    assert planned["prediction"]["peak_bytes"] < planned["plain"]["peak_bytes"]


@pytest.mark.slow
def test_the_dtype_is_what_the_device_computes_in():
    """By default; a line on stderr says so where it is not bf16, and one of an emulated dtype."""
    expected = choose("auto", "cpu")
    on_cpu = [*VIT, "--json", "--device", "cpu"]
    result = run("profile", *on_cpu, "--fake")
    assert json.loads(result.stdout)["dtype"] == {"no": "float32"}.get(expected.name, expected.name)
    if expected.name != "bf16":
        assert result.stderr == f"mesa-train: {expected.line}\n"
        # Bytes are counted without arithmetic, so that nothing is slow; a real step is.
        assert run("profile", *on_cpu, "--fake", "--dtype", "bf16").stderr == ""
        small = [VIT[0], "--batch-size", "1", "--image-size", "16", "--json", "--device", "cpu"]
        message = run("profile", *small, "--dtype", "bf16").stderr
        assert message.endswith("many times slower than float32; auto takes float32\n")


def test_half_weights_need_no_autocast(tmp_path, monkeypatch):
    (tmp_path / "in_half.py").write_text(
        "import torch\ndef half():\n"
        "    return torch.nn.Linear(8, 4).bfloat16(), torch.rand(16, 8).bfloat16()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = run(
        "profile", "python:in_half.half", "--device", "cpu", "--json", "--batch-size", "16"
    )
    assert json.loads(result.stdout)["dtype"] == "float32"
    assert result.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_dtypes(dtype):
    result = run("compare", *VIT, "--fake", "--json", "--dtype", dtype, "--methods", "plain")
    assert json.loads(result.stdout)["dtype"] == dtype


def test_a_sigterm_ends_a_comparison_as_ctrl_c_does():
    def ended():
        with _stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        ended()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_as_a_module():
    command = [
        sys.executable,
        "-m",
        "mesa_train.cli",
        "compare",
        *VIT,
        "--fake",
        "--json",
        "--methods",
        "plain",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "vit_tiny_patch16_224"


def test_help():
    assert run("--help").exit_code == 0
    assert "--batch-size" in run("compare", "--help").stdout
