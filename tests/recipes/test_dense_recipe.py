"""The dense recipes as a user starts them: on two processes, killed and continued, evaluated, misused."""

import json
import os
import re
import signal
import time
from pathlib import Path

import forked
import psutil
import pytest
from limits import HUNG_S

from mesa_train.training.dense.composed import write_coco, write_maps

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/dense"
SMALL = [
    "data.short_side=64", "data.long_side=80", "data.workers=0", "train.device=cpu",
    "train.precision=no", "train.log_every=1", "train.pictures=2", "train.global_batch=4",
    "train.micro_batch=2", "model.classes=2",
]  # fmt: skip
FORMATS = {"detection": "coco", "segmentation": "ade"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("digits")
    options = {"size": (64, 80), "sides": (24, 40), "objects": (1, 2), "digits": range(2)}
    write_coco(made / "coco", {"train": 8, "val": 3}, **options)
    write_maps(made / "ade", {"training": 8, "validation": 3}, **options)
    return made


def command(kind, folder, out, *changes, launch="cpu.yaml", options=()):
    parts = [
        "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "recipes/accelerate" / launch), "--main_process_port", "0",
        str(RECIPE / "train.py"), "--config", str(RECIPE / f"quickstart_{kind}.yaml"), *options,
    ]  # fmt: skip
    name = FORMATS[kind]
    data = [f"data.format={name}", f"data.path={folder / name}"]
    if kind == "detection":
        data += ["data.train=train", "data.val=val"]
    else:
        data += ["model.classes=4", "augment.crop=64"]
    for change in (*SMALL, *data, f"train.out={out}", *changes):
        parts += ["--set", change]
    return parts


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def numbers(out, names):
    return [{key: row[key] for key in names if key in row} for row in rows(out)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "policy"), [("detection", "mesa8"), ("segmentation", "plain")])
def test_two_processes_have_the_losses_of_one(kind, policy, folder, tmp_path):
    steps = ["train.steps=4", "train.eval_every=4", "train.pictures=0", f"train.policy={policy}"]
    # AdamW's first steps have the size of the rate, also where a gradient is rounding alone.
    steps += ["optim.warmup_steps=100"]
    found = {}
    for name, launch in (("one", "cpu.yaml"), ("two", "cpu_2_processes.yaml")):
        done = forked.run(
            command(kind, folder, tmp_path / name, *steps, launch=launch), env=environment()
        )
        assert done.returncode == 0, done.stderr
        found[name] = rows(tmp_path / name)
        parts = "2 accumulated x 1 process" if name == "one" else "1 accumulated x 2 processes"
        assert f"batch 4 = 2 x {parts}" in done.stdout
    assert len(found["one"]) == len(found["two"]) == 5
    for one, two in zip(found["one"][:4], found["two"][:4], strict=True):
        # Sums in another order.
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=5e-3)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_end(folder, tmp_path):
    steps = ["train.steps=8", "train.eval_every=4", "train.save_every=2"]
    whole = forked.run(command("detection", folder, tmp_path / "whole", *steps), env=environment())
    assert whole.returncode == 0, whole.stderr

    cut = tmp_path / "cut"
    process = forked.start(command("detection", folder, cut, *steps), env=environment())
    deadline = time.monotonic() + HUNG_S
    while not any(row["step"] >= 5 for row in rows(cut)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.send_signal(signal.SIGKILL)
    process.result(HUNG_S)

    again = forked.run(
        command("detection", folder, cut, *steps, options=("--resume", "auto")), env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"continues after step (\d+)", again.stdout)[1]) >= 4
    names = ("step", "loss", "grad_norm", "lr", "train_loss", "ap", "ap50")
    assert numbers(cut, names) == numbers(tmp_path / "whole", names)

    scored = forked.run(
        [RECIPE / "evaluate.py", "--run", cut, "--pictures", "1"], env=environment()
    )
    assert scored.returncode == 0, scored.stderr
    best = max(row["ap"] for row in rows(cut) if "ap" in row)
    assert json.loads(scored.stdout.splitlines()[-1])["ap"] == pytest.approx(best)


@pytest.mark.slow
def test_mistakes_are_one_line(folder, tmp_path):
    for changes, line in (
        (["train.polcy=mesa8"], "dense: unknown key train.polcy; did you mean policy?\n"),
        (
            ["model.classes=3"],
            f"dense: model.classes=3, but {folder / 'coco'} has 2: zero, one; "
            "set model.classes=2\n",
        ),
    ):
        parts = command("detection", folder, tmp_path / "run", *changes)
        done = forked.run(parts[parts.index("0") + 1 :], env=environment())
        assert done.returncode == 1
        assert done.stderr == line
        assert done.stdout == ""
