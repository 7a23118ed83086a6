"""The command line: one line for every wrong request."""

import json

import pytest
from command_line import VIT, run


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
        (["profile", *VIT, "--diff", "mesa9"], "unknown method 'mesa9'"),
        (["compare", *VIT, "--memory", "lots"], "a size must be a number with a unit"),
        (["plan", *VIT, "--fake", "--budget", "lots"], "a size must be a number with a unit"),
        (["estimate", *VIT, "--gpus", "3", "--nodes", "2"], "must be a multiple of nodes"),
        (["estimate", *VIT, "--policies", "mesa9"], "unknown method 'mesa9'"),
        (
            ["estimate", *VIT, "--gpu-memory", "24"],
            "--gpu-memory: a size needs a unit, such as 24GiB, got '24'",
        ),
        (["compare", *VIT, "--methods", "plain,mesa9"], "did you mean 'mesa8'?"),
        (["compare", *VIT, "--batchsize", "4"], "--batch-size"),
        (["compare", *VIT, "--dtype", "bfloat16"], "is not one of"),
        (["compair", *VIT], "Did you mean 'compare'?"),
        (["compare"], "Missing argument"),
        (["compare", "pyhton:my.build"], "did you mean python:my.build?"),
        (["compare", *VIT, "--out", "/dev/null/out"], "--out /dev/null/out"),
        (["plan", *VIT, "--out", "plan.txt"], "--out plan.txt: the file name must end in .yaml"),
        (["plan", *VIT, "--baselines", "rows.jsonl"], "--baselines needs --frontier"),
        (
            ["plan", *VIT, "--frontier", "c.png", "--baselines", "no.jsonl"],
            "--baselines no.jsonl: no such file",
        ),
    ],
)
def test_one_line_for_a_wrong_request(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    *before, error = result.stderr.splitlines()
    assert message in error
    # A processor without bfloat16 is told so first.
    assert all("precision auto" in line for line in before)
    assert len(before) <= 1


NARROW = """
import torch


class Reads(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x * 2 if x.mean() > 9 else x)


def half():
    return torch.nn.Linear(8, 4).half(), torch.rand(16, 8).half()


def reads():
    return Reads(8, 4), torch.rand(8, 8)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "half", "--dtype", "bf16"],
            "float16 weights; a CPU cannot run them with --dtype bf16",
        ),
        (["profile", "half", "--dtype", "bf16"], "choose fp16, or float32 for no autocast"),
        (["compare", "reads", "--fake"], "fake tensors do not have (narrow.py, line 7: "),
        (["profile", "reads", "--fake"], "`mesa-train profile` without --fake"),
        (["estimate", "reads", "--batch-size", "8"], "Reads reads values"),
    ],
)
def test_one_line_for_a_model_that_cannot(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text(NARROW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command, name, *more = arguments
    result = run(command, f"python:narrow.{name}", *more)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_rivals_of_another_batch(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"method": "plain", "model": VIT[0], "shapes": [[4, 3, 64, 64]]}
    rows.write_text(json.dumps(row) + "\n")
    options = ["--fake", "--frontier", str(tmp_path / "c.png"), "--baselines", str(rows)]
    result = run("plan", *VIT, *options)
    assert result.exit_code == 2
    assert (
        f"the rows are of {VIT[0]} with 4x3x64x64, not of {VIT[0]} with 2x3x64x64" in result.stderr
    )
