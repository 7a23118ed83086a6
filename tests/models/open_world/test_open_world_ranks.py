"""Two ranks have the losses of one process, and equal queues and prototypes."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import torch
from limits import HUNG_S

HERE = Path(__file__).parent
ONE = "import sys, torch, open_world_worker as w; torch.save(w.run(0, 1), sys.argv[1])"


def test_two_ranks_are_one_process(tmp_path):
    root = HERE.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = forked.run(
        [*command, HERE / "open_world_worker.py", tmp_path], env=environment, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    subprocess.run(
        [sys.executable, "-c", ONE, tmp_path / "one.pt"],
        env=environment, timeout=HUNG_S, check=True,
    )  # fmt: skip
    every = [torch.load(tmp_path / f"{name}.pt") for name in ("one", "rank0", "rank1")]
    one, *ranks = (found["steps"] for found in every)
    assert one["losses"][1]["loss_clustering"] > 0
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name
        assert torch.allclose(value.double(), one["state"][name].double(), atol=1e-5), name
    for found in ranks:
        for step, losses in enumerate(one["losses"]):
            for name, loss in losses.items():
                assert abs(found["losses"][step][name] - loss) < 2e-5, (step, name)
    # Micro-batches of two ranks, or of one process with accumulation.
    one, *ranks = (found["deferred"] for found in every)
    assert int(one["state"]["steps"]) == 4
    assert one["state"]["prototypes"].any()
    for found in ranks:
        for name, value in found["state"].items():
            assert torch.equal(value, ranks[0]["state"][name]), name
            assert torch.allclose(value.double(), one["state"][name].double(), atol=1e-4), name
        for loss, expected in zip(found["losses"], one["losses"], strict=True):
            assert abs(loss - expected) < 2e-5
