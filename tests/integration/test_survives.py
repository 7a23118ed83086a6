"""What a long run meets: exceptions in forward and backward, a kill at any step, a rank that dies."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from integration_models import POLICIES, Net, batch
from limits import HUNG_S
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from worker_tools import launch

import mesa_train
from mesa_train.stash import stash

PRESETS = pytest.mark.parametrize("preset", POLICIES)


class Fails(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("backward")


class Failing(nn.Module):
    """A net that fails behind its first block: in the forward, in the backward, or not at all."""

    def __init__(self, policy):
        super().__init__()
        self.net, self.fails = mesa_train.wrap(Net(drop=0.0), policy), None
        self.net.blocks[1].register_forward_pre_hook(self.hook)

    def hook(self, module, arguments):
        if self.fails == "forward":
            raise KeyError("forward")
        return (Fails.apply(arguments[0]),) if self.fails == "backward" else arguments

    def step(self, fails=None):
        self.fails = fails
        self.net(batch()).square().mean().backward()


@PRESETS
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.compatibility("Failures", "an exception in the {where}")
def test_an_exception_leaves_nothing_behind(where, preset):
    model = Failing(POLICIES[preset])
    model.step()
    kept = []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    for _ in range(3):
        with saved_tensors_hooks(pack, lambda t: t), pytest.raises(KeyError, match=where):
            model.step(where)
        assert not _get_current_function_mode_stack()
    model.step()  # the next backward clears what a broken one handed on
    gc.collect()
    assert len(kept) > 30
    assert all(storage.expired() for storage in kept)
    assert not stash.backward_cache.values
    assert not stash.backward_cache.gradients


# A run that dies and goes on: every random stream, stochastic rounding, running ranges, a scaler and a
# schedule. Stochastic rounding is a hash of the data, so there is nothing of it to save.
LOOP = """
import os, sys, warnings
import torch
from integration_models import Net, batch
import mesa_train

warnings.simplefilter("ignore")
path, steps, preset, log = sys.argv[1], int(sys.argv[2]), sys.argv[3], open(sys.argv[4], "a")
policies = {
    "stochastic": mesa_train.Policy(bits=4, rounding="stochastic", min_bytes=0),
    "recompute": mesa_train.Policy(min_bytes=0, recompute="linear"),
}
torch.manual_seed(7)
model = mesa_train.wrap(Net(drop=0.2), policies[preset])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
first = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for part, name in ((optimizer, "optimizer"), (schedule, "schedule"), (scaler, "scaler")):
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    first = saved["step"]
for number in range(first, steps):
    with torch.autocast("cpu", torch.float16):
        loss = model(batch(seed=number) + 0.1 * torch.randn(4, 16, 12)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    schedule.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
                "random": torch.get_rng_state(), "step": number + 1}, path + ".new")
    os.replace(path + ".new", path)
    print(number, float(loss).hex(), scaler.get_scale(), file=log, flush=True)
"""


def run_loop(folder, name, preset, steps, kill_after=None):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.log"
    process = forked.start(["-c", LOOP, checkpoint, steps, preset, log], env=environment)
    if kill_after is not None:
        deadline = time.monotonic() + HUNG_S
        while not log.exists() or len(log.read_text().splitlines()) < kill_after:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.result(HUNG_S).returncode == -signal.SIGKILL
    else:
        done = process.result(HUNG_S)
        assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in log.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["stochastic", "recompute"])
@pytest.mark.compatibility("Failures", "SIGKILL and resume")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, preset):
    steps = 25
    expected = run_loop(tmp_path, "whole", preset, steps)
    run_loop(tmp_path, "killed", preset, steps, kill_after=9)
    found = run_loop(tmp_path, "killed", preset, steps)
    assert len(expected) == steps
    assert found == expected


@pytest.mark.slow
@pytest.mark.compatibility("Failures", "a dying rank and a restart")
def test_a_rank_that_dies_ends_the_job_and_a_restart_goes_on(tmp_path):
    launch("dying_worker.py", tmp_path, "die", expected=1, as_a_user=True)
    results = launch("dying_worker.py", tmp_path, "go on")
    for result in results:
        assert "error" not in result["resumed"], result["resumed"]["error"]
    values = results[0]["resumed"]
    assert 0 < values["first"] < values["steps"]
    assert values["weights"] == values["uninterrupted"]


@pytest.mark.slow
@pytest.mark.compatibility("Failures", "resident memory over many steps")
def test_soaked_for_a_short_while(tmp_path):
    """scripts/bench/soak.py, whose long run is for releases: all presets, exceptions in between.

    Over so few steps the allocator's own steps of tens of MiB weigh 60 kB each; all that a step keeps
    is over 200 kB, and single tensors that stay are counted."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(
                sys.executable,
                str(root / "scripts/bench/soak.py"),
                "--steps",
                "300",
                "--limit",
                "150000",
            ),
            *("--out", str(tmp_path / "rows.jsonl")),
        ],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=HUNG_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == [*mesa_train.PRESETS, "mesa8, fused forward"]
    assert all(row["failed"] == 60 and row["left"] == 0 for row in rows)
