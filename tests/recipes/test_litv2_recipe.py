"""The recipe as a user starts it: under accelerate launch, on two processes, killed and continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from limits import HUNG_S

from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification.config import load

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/litv2"
CONFIGS = sorted(path.name for path in RECIPE.glob("*.yaml"))
SMALL = [
    "data.source=digits", "data.image_size=32", "train.tracker=none", "train.log_every=1",
    "train.device=cpu", "augment.mixup=0.8",
]  # fmt: skip


def command(launch, out, *changes, script="train.py", options=()):
    parts = [
        "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "recipes/accelerate" / launch), "--main_process_port", "0",
        str(RECIPE / script), "--config", str(RECIPE / "quickstart.yaml"), *options,
    ]  # fmt: skip
    for change in (*SMALL, f"train.out={out}", *changes):
        parts += ["--set", change]
    return parts


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command, as_a_user=False):
    """`python COMMAND...`. `as_a_user`: by processes that begin with their imports, and torch's own agent."""
    if as_a_user:
        command = [sys.executable, *command]
        return subprocess.run(command, env=environment(), capture_output=True, text=True)
    return forked.run(command, env=environment())


def rows(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.slow
def test_two_processes_killed_and_continued(tmp_path):
    """SIGKILL in the middle of an epoch: the end is the same to the last bit."""
    steps = ["train.epochs=2", "optim.warmup_epochs=0", "train.save_every=5"]
    whole = run(command("cpu_2_processes.yaml", tmp_path / "whole", *steps), as_a_user=True)
    assert whole.returncode == 0, whole.stderr
    # The file's micro-batch of 64 is more than a process's part.
    assert "64 = 32 x 1 accumulated x 2 processes" in whole.stdout

    cut = tmp_path / "cut"
    process = forked.start(command("cpu_2_processes.yaml", cut, *steps), env=environment())
    deadline = time.monotonic() + HUNG_S
    while not any(row["step"] >= 28 for row in rows(cut)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.send_signal(signal.SIGKILL)
    process.result(HUNG_S)
    reached = max(row["step"] for row in rows(cut))
    assert reached < 44

    again = run(command("cpu_2_processes.yaml", cut, *steps, options=("--resume", "auto")))
    assert again.returncode == 0, again.stderr
    resumed = int(re.search(r"continues after step (\d+)", again.stdout)[1])
    assert 25 <= resumed <= reached

    timeless = ("loss", "grad_norm", "lr", "train_loss", "val_loss", "top1", "top5", "step")
    expected = [{k: row[k] for k in timeless if k in row} for row in rows(tmp_path / "whole")]
    assert [{k: row[k] for k in timeless if k in row} for row in rows(cut)] == expected
    from safetensors.torch import load_file

    ends = [
        load_file(tmp_path / name / "checkpoints/last/model.safetensors")
        for name in ("whole", "cut")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())

    scored = run([RECIPE / "evaluate.py", "--run", cut])
    best = max(row["top1"] for row in expected if "top1" in row)
    assert json.loads(scored.stdout)["top1"] == best
    assert best > 0.5


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    quickstart = RECIPE / "quickstart.yaml"
    done = run([RECIPE / "train.py", "--config", quickstart, "--set", "train.polcy=mesa8"])
    assert done.returncode == 1
    assert done.stderr == "litv2: unknown key train.polcy; did you mean policy?\n"
    assert done.stdout == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_valid_and_its_batches_divide(name):
    config = load(RECIPE / name)
    images = config.data.train_images or 4000
    world = int(
        re.search(r"(?m)^# processes: (\d+)", (RECIPE / name).read_text() + "\n# processes: 1")[1]
    )
    made = plan.plan(config, images, world)
    assert made.accumulation * config.train.micro_batch * world == config.train.global_batch
    if "imagenet" in name or "384" in name:
        assert config.train.global_batch == 1024
        assert made.steps_per_epoch == 1251


LAUNCH = {
    "cpu": ("NO", 1), "cpu_2_processes": ("MULTI_GPU", 2), "gpu": ("NO", 1),
    "ddp": ("MULTI_GPU", 4), "fsdp2": ("FSDP", 4), "zero1": ("DEEPSPEED", 4),
    "zero2": ("DEEPSPEED", 4), "zero3": ("DEEPSPEED", 4), "zero3_offload": ("DEEPSPEED", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCH)
def test_launch_files_are_what_accelerate_expects(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == LAUNCH[name]
    assert config.use_cpu == name.startswith("cpu")
    # Precision is the recipe's to say.
    assert config.mixed_precision == "no"


def test_every_launch_file_is_known():
    assert sorted(p.stem for p in (ROOT / "recipes/accelerate").glob("*.yaml")) == sorted(LAUNCH)


BUDGETS = [name for name in CONFIGS if "gb" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_state_the_memory_that_is_predicted(name):
    text = (RECIPE / name).read_text()
    stated, limit = re.search(r"# predicted: ([\d.]+) GiB of (\d+) GB", text).groups()
    config = load(RECIPE / name)
    total = sum(plan.memory(config, 1000).values())
    assert total / 2**30 == pytest.approx(float(stated), abs=0.06)
    # Kernels' work space, the allocator's slack and the CUDA context: 2 GiB and a tenth.
    assert 1.1 * total + 2 * 2**30 < int(limit) * 1e9
