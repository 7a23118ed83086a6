"""The other entry points, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, REPOSITORY / "recipes/vit22b" / script, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_probe_on_digits_without_a_download(tmp_path):
    done = run("probe.py", "--out", tmp_path, "--views", 1)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "result.json").read_text())
    # Features of random weights tell digits apart three times better than chance (10 %).
    assert row["linear_probe"] > 0.3
    assert row["nearest_neighbours"] > 0.3
    assert run("probe.py", "--out", tmp_path, "--train", "nowhere").returncode == 1


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


@pytest.mark.parametrize("method", ["nf4", "lion", "factored"])
def test_one_card_methods_run_and_say_what_they_expect(tmp_path, method):
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    done = run("onecard.py", method, "--image-size", 56, "--batch-size", 16, "--out", tmp_path,
               "--lr", 1e-3, "--steps", 8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("expected: weights ")
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["losses"][-1] < row["losses"][0]
    assert set(row["predicted_bytes"]) == {
        "weights", "gradients", "optimizer", "gathered", "activations",
    }  # fmt: skip


def test_one_card_refuses_mistakes():
    for arguments, said in (
        (["adam"], "method must be one of nf4, factored, lion"),
        (["lion", "--model", "vit_b"], "model must be one of vit_22b_tiny"),
        (["lion", "--policy", "plain"], "coded needs a policy"),
        (["nf4", "--weights", "nowhere"], "neither a safetensors file nor a folder"),
    ):
        done = run("onecard.py", *arguments, "--image-size", 56)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
