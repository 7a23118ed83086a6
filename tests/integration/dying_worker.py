"""Worker: DDP training with a checkpoint per step. `die`: the second process ends in the middle;
`go on`: resumes from what is there, and compares with a run that nothing disturbed."""

import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from integration_models import Net, batch
from torch.nn.parallel import DistributedDataParallel
from worker_tools import criterion, run, share, start

import mesa_train

STEPS = 8
POLICY = mesa_train.Policy(bits=4, rounding="stochastic", min_bytes=0)


def train(path, dies_at=None):
    """(weights' digest, the step it started at)."""
    model = mesa_train.wrap(Net(drop=0.0), POLICY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = 0
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    parallel = DistributedDataParallel(model)
    for number in range(first, STEPS):
        if number == dies_at and dist.get_rank() == 1:
            os._exit(13)
        criterion(parallel(share(batch(seed=number)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if path is not None and dist.get_rank() == 0:
            new = path.with_suffix(".new")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": number + 1}, new)
            new.replace(path)
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest(), first


def resumed():
    weights, first = train(Path(sys.argv[1]) / "checkpoint.pt")
    uninterrupted, _ = train(None)
    return {"weights": weights, "uninterrupted": uninterrupted, "first": first, "steps": STEPS}


if __name__ == "__main__":
    start()
    if sys.argv[2] == "die":
        train(Path(sys.argv[1]) / "checkpoint.pt", dies_at=4)
    run({"resumed": resumed}, sys.argv[1])
