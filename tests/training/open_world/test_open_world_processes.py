"""One and two processes of the recipe have the same losses, weights and batch norm statistics."""

import os
from pathlib import Path

import forked
import pytest
import torch
from limits import HUNG_S
from open_world_folders import coco_folder
from safetensors.torch import load_file
from torch import nn

from mesa_train.training.open_world.statistics import in_turn
from mesa_train.utils import records

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes/open_world"
SMALL = (
    *("model.box_dim=16", "model.channels=16", "model.regions=16", "model.proposals=80"),
    *("data.format=coco", "data.tasks=person, airplane; truck", "data.short_side=64"),
    *("data.long_side=64", "optim.steps=3, 2", "optim.finetune_steps=0, 1", "optim.milestones="),
    *("train.save_every=0", "train.log_every=1", "train.global_batch=4", "train.micro_batch=1"),
    *("method.start=1", "method.exemplars=3", "train.pictures=0", "train.device=cpu"),
    *("method.energy=off", "train.policy=plain", "optim.lr=1e-3", "train.precision=no"),
)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    names = ["person", "airplane", "truck", "kite"]
    train = {f"p{i:02d}": [(names[i % 3], 0), ("kite", 0), (names[i % 2], 0)] for i in range(12)}
    val = {"v": [("truck", 0), ("kite", 0), ("person", 1)], "w": [("airplane", 0)]}
    folder = coco_folder(tmp_path / "data", {"train": train, "val": val})
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for count in (1, 2):
        changes = (*SMALL, f"data.path={folder}", f"train.out={tmp_path / str(count)}")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [RECIPE / "train.py", "--config", RECIPE / "quickstart.yaml"]
        command += [part for change in changes for part in ("--set", change)]
        done = forked.run(command, env=environment, timeout=HUNG_S)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (
        [r for r in records.read(tmp_path / n / "metrics.jsonl") if r["kind"] == "step"]
        for n in ("1", "2")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 7))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2), a["step"]
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    counts = [name for name in one if name.endswith("num_batches_tracked")]
    assert counts
    for name in counts:
        # 6 steps of 4 micro-batches.
        assert int(one[name]) == int(two[name]) == 24
    for name, value in one.items():
        if "running" in name:
            assert torch.allclose(two[name], value, rtol=1e-3, atol=1e-4), name
    weights = [name for name in one if name.endswith((".weight", ".bias"))]
    ours, theirs = (torch.cat([run[n].flatten() for n in weights]) for run in (one, two))
    # Adam divides by gradients near zero, so single weights may differ by a step.
    assert (ours - theirs).norm() < 1e-3 * ours.norm()


def test_statistics_in_turn_are_those_of_one_process():
    torch.manual_seed(0)
    batches = torch.randn(3, 5, 4, 2, 2)
    norms = [nn.BatchNorm2d(4, momentum=0.3) for _ in range(4)]
    every, *each = norms
    for norm in norms:
        norm(torch.ones(2, 4, 1, 1) * torch.arange(4)[:, None, None])
    before = every.running_mean.clone(), every.running_var.clone()
    for norm, batch in zip(each, batches, strict=True):
        every(batch)
        norm(batch)
    for name, old in zip(("running_mean", "running_var"), before, strict=True):
        found = in_turn(old, [getattr(norm, name) for norm in each], 0.7)
        assert torch.allclose(found, getattr(every, name), atol=1e-6), name
        assert not torch.allclose(found, getattr(each[0], name), atol=1e-2), name
