"""Two ranks: the official loss, and a step that equals the step of one process."""

import os
from pathlib import Path

import forked
import moco_cases as cases
import numpy as np
import pytest
import torch
from limits import HUNG_S

from mesa_train.models.moco import moco_loss

HERE = Path(__file__).parent
GOLDEN = cases.arrays("loss")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moco")
    root = HERE.parents[2]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = forked.run([*command, HERE / "moco_worker.py", folder], env=environment, timeout=HUNG_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_the_loss_of_one_process():
    f = cases.normal(int(GOLDEN["w1_seed"]), 4, 1, 6, 16, dtype="float64")[:, 0]
    q1, q2 = (x.clone().requires_grad_() for x in f[:2])
    one, two = moco_loss(q1, f[3] + 0.8 * f[0]), moco_loss(q2, f[2] + 0.8 * f[1])
    (one + two).backward()
    assert one.item() == pytest.approx(GOLDEN["w1_loss_q1k2"][0], abs=1e-14)
    assert two.item() == pytest.approx(GOLDEN["w1_loss_q2k1"][0], abs=1e-14)
    assert q1.grad.numpy() == pytest.approx(GOLDEN["w1_grad_q1"][0], abs=1e-14)
    assert q2.grad.numpy() == pytest.approx(GOLDEN["w1_grad_q2"][0], abs=1e-14)


def test_the_loss_at_chance_is_scaled():
    q = torch.eye(64, 4096, dtype=torch.float64)
    loss = moco_loss(q, q.roll(64, 1), 0.2)
    assert loss.item() == pytest.approx(0.4 * np.log(64))


@pytest.mark.parametrize("case", ["w2", "w2T1"])
def test_the_loss_over_ranks(ranks, case):
    for rank, found in enumerate(ranks):
        for side in ("q1k2", "q2k1"):
            wanted = GOLDEN[f"{case}_loss_{side}"][rank]
            assert found[case][side] == pytest.approx(wanted, abs=1e-14)
        for q in ("grad_q1", "grad_q2"):
            wanted = GOLDEN[f"{case}_{q}"][rank]
            assert found[case][q].numpy() == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("way", ["step", "joint", "chunks"])
def test_two_ranks_are_one_process(ranks, way):
    model = cases.tiny()
    loss = model(*cases.views(), 0.9)
    loss.backward()
    statistics = dict(model.named_buffers())
    for found in ranks:
        assert found[way]["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
        assert cases.distance(found[way]["gradients"], cases.gradients(model)) < 1e-12
        for name, value in found[way]["buffers"].items():
            assert value.numpy() == pytest.approx(statistics[name].numpy(), abs=1e-12), name
