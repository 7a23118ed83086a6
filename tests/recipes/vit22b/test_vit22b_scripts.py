"""The other entry points, as a user calls them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import typer
from limits import HUNG_S
from safetensors.torch import load_file
from typer.testing import CliRunner

from mesa_train.training.vit22b.loop import model_flops, peak_tflops_of

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def run(script, *arguments, as_a_user=False):
    """A call of a script. `as_a_user`: by a process that begins with its imports."""
    command = [str(REPOSITORY / "recipes/vit22b" / script), *map(str, arguments)]
    where = {
        "cwd": REPOSITORY,
        "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)},
        "timeout": HUNG_S,
    }
    if as_a_user:
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, **where)
    return forked.run(command, **where)


def asked(script, *arguments):
    """(exit code, all that is printed) of a script in this process: mistakes are many, and PyTorch takes
    seconds to import."""
    specification = importlib.util.spec_from_file_location(
        "script", REPOSITORY / "recipes/vit22b" / script
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def test_probe_on_digits_without_a_download(tmp_path):
    done = run("probe.py", "--out", tmp_path, as_a_user=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("expected: weights ")
    row = json.loads((tmp_path / "result.json").read_text())
    # Features of random weights reach 0.74 and 0.63; chance is 0.1.
    assert row["linear_probe"] > 0.65
    assert row["nearest_neighbours"] > 0.55
    for mistake, said in (
        (["--train", "nowhere"], "--train must be a folder with a --held-out folder beside it"),
        (["--model", "vit_22"], "did you mean vit_22b?"),
        (["--image-size", 60], "--image-size must be a multiple of 14"),
    ):
        code, output = asked("probe.py", "--out", tmp_path, *mistake)
        assert code == 1
        assert output.splitlines()[-1].startswith("error: ")
        assert said in output


def test_probe_on_folders_with_another_set(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test", "other"):
        for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = tmp_path / split / (label if split != "other" else label + "dish")
            folder.mkdir(parents=True)
            for i in range(12):
                shade = tuple(c + 5 * i % 40 for c in colour)
                image.new("RGB", (64, 60), shade).save(folder / f"{i}.png")
    mapping = tmp_path / "map.yaml"
    arguments = (
        "--out", tmp_path / "out", "--train", tmp_path / "train", "--held-out", tmp_path / "test",
        "--set-folder", tmp_path / "other", "--mapping", mapping,
    )  # fmt: skip
    mapping.write_text("red: reddish\nblue: blush\n")
    done = run("probe.py", *arguments)
    assert done.returncode == 1
    assert "label of the set 'blush' is unknown" in done.stderr
    mapping.write_text("red: reddish\nblue: bluedish\n")
    done = run("probe.py", *arguments)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out/result.json").read_text())
    assert row["linear_probe"] == 1.0
    assert row["other"]["images"] == 24
    assert row["other"]["accuracy"] == 1.0


def test_dry_runs_say_what_a_card_needs():
    """22B on the meta device, and a sibling with 8-bit moments: parts, no training."""
    done = run("train.py", "recipes/vit22b/22b.yaml", "--dry-run", "--ranks", 8)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("vit_22b at 224 px, 22,203,")
    assert lines[1] == "fsdp2 on 8 processes"
    assert lines[2] == "batch 256 = 32 x 1 accumulated x 8 ranks, 20 steps"
    # 4, 4 and 8 bytes of 22.2 billion, over 8 cards.
    assert [line.split()[:2] for line in lines if line.startswith("  ")][:3] == [
        ["weights", "10.3"],
        ["gradients", "10.3"],
        ["optimizer", "20.7"],
    ]
    recipes = REPOSITORY / "recipes/vit22b"
    code, output = asked("train.py", recipes / "3b.yaml", "--dry-run")
    assert code == 0
    assert "policy mesa8+coded, precision pure_bf16, optimizer adamw8bit" in output
    code, output = asked("train.py", recipes / "large.yaml", "--dry-run", "--ranks", 3)
    assert code == 2
    assert "no multiple of train.micro_batch=64 on 3 data-parallel ranks" in output


@pytest.mark.parametrize("method", ["nf4", "lion", "factored"])
def test_one_card_methods_run_and_say_what_they_expect(tmp_path, method):
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    images = "random" if method == "factored" else "mnist5k"
    done = run("onecard.py", method, "--image-size", 56, "--batch-size", 16, "--out", tmp_path,
               "--lr", 1e-3, "--steps", 8, "--images", images, "--peak-tflops", 1,
               "--ema", 0.99)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("expected: weights ")
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["losses"][-1] < row["losses"][0]
    assert row["mfu"] == row["images_per_s"] * model_flops("vit_22b_tiny", 56) / 1e12
    assert set(row["predicted_bytes"]) == {
        "weights", "gradients", "optimizer", "gathered", "activations", "average",
    }  # fmt: skip
    averaged = load_file(tmp_path / "averaged.safetensors")
    assert sum(t.nbytes for t in averaged.values()) == row["predicted_bytes"]["average"]
    assert all(t.isfinite().all() for t in averaged.values())
    if method == "nf4":
        # The product of an adapter is 0 at first, and the average has moved.
        assert max(t.abs().max() for n, t in averaged.items() if n.endswith(".b")) > 0
        assert {n for n in averaged if n.startswith("head.")} == {"head.weight", "head.bias"}
    else:
        code, output = asked(
            "onecard.py", method, "--image-size", 56, "--batch-size", 16, "--steps", 1,
            "--images", images, "--weights", tmp_path / "averaged.safetensors", "--out", tmp_path,
        )  # fmt: skip
        assert code == 0, output


def test_the_peak_of_a_card_is_that_of_its_longest_name():
    assert peak_tflops_of("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops_of("NVIDIA H100 PCIe") == 756
    assert peak_tflops_of("AMD EPYC") is None


def test_one_card_refuses_mistakes():
    done = run("onecard.py", "adam")
    assert done.returncode == 1
    assert done.stderr.startswith("error: method must be one of nf4, factored, lion")
    assert "Traceback" not in done.stderr
    for arguments, said in (
        (["lion", "--model", "vit_b"], "model must be one of vit_22b_tiny"),
        (["lion", "--policy", "plain"], "coded needs a policy"),
        (["lion", "--ema", "1"], "ema must lie in [0, 1)"),
        (["lion", "--images", "randm"], "(did you mean random?)"),
        (["nf4", "--weights", "nowhere"], "neither a safetensors file nor a folder"),
    ):
        code, output = asked("onecard.py", *arguments, "--image-size", 56)
        assert code == 1
        assert output.splitlines()[-1].startswith("error: ")
        assert said in output
