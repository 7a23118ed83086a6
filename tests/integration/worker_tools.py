"""What a worker of the distributed tests runs: named checks on two CPU processes, results as JSON.

A worker is launched once for many checks; the tests read the results. torchrun's ranks are forked from a process
that has imported PyTorch (`forked.py`). A check returns values to compare; one that fails leaves its traceback.
All processes end by `os._exit` after a barrier: gloo's threads may otherwise abort the interpreter on its way out.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from integration_models import POLICIES, Net, batch, saved_bytes
from torch import nn

import mesa_train

STEPS = 3
ROWS = 4  # of the global batch, over two processes


def launch(worker, folder, *arguments, expected=0, as_a_user=False):
    """Run a worker file on two processes; its results, one dict per process. `as_a_user`: by processes that begin
    with their imports, and torch's own agent."""
    import forked  # neither is there in a worker
    from limits import HUNG_S

    here = Path(__file__).parent
    root = here.parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(here)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(here / worker), str(folder), *map(str, arguments)]
    where = {"env": environment, "timeout": HUNG_S}
    if as_a_user:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **where)
    else:
        done = forked.run(command, **where)
    output = done.stdout[-6000:] + done.stderr[-6000:]
    assert (done.returncode == 0) == (expected == 0), f"exit {done.returncode}\n{output}"
    if expected:
        return output
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]


def run(checks, folder):
    """In a worker: every check in turn, then the results to a file."""
    warnings.simplefilter("ignore")
    results = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            results[name] = check()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    rank = dist.get_rank()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    leave()


def leave():
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def start():
    dist.init_process_group("gloo", timeout=timedelta(hours=1))


def share(tensor):
    """This process's rows of a global batch."""
    rows = len(tensor) // dist.get_world_size()
    return tensor[dist.get_rank() * rows :][:rows]


def wrapped(model, preset):
    return model if preset is None else mesa_train.wrap(model, POLICIES[preset])


def criterion(output):
    return output.float().square().mean()


def train(forward, backward, advance, *, cast=contextlib.nullcontext, make=batch):
    """The losses of a few steps (mean over processes) and the bytes saved in the first."""
    losses, kept = [], 0
    for number in range(STEPS):
        x = share(make(seed=number))
        with cast():
            size, output = saved_bytes(lambda x=x: forward(x))
        loss = criterion(output)
        backward(loss)
        advance()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        kept = kept or size
    return losses, kept


def alone(preset=None, *, prepare=lambda model: model, cast=contextlib.nullcontext, lr=0.1):
    """The same steps on the global batch in one process: losses and final weights."""
    model = wrapped(prepare(Net(drop=0.0)), preset)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for number in range(STEPS):
        with cast():
            output = model(batch(seed=number))
        loss = criterion(output)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


def moved(state, reference):
    """Relative distance of weights from a reference, in units of how far training moved them."""
    start = Net(drop=0.0).state_dict()
    difference = sum(float((state[n].float() - reference[n]).square().sum()) for n in reference)
    way = sum(float((reference[n] - start[n]).square().sum()) for n in reference)
    return (difference / way) ** 0.5


def frozen(model):
    for module in (model.stem, model.blocks[0]):
        module.requires_grad_(False)
    return model


def unused(model):
    model.unused = nn.Linear(3, 3)
    return model


def setups(variant):
    """(preset, wrapped after) of a variant: all of them for the three that are unlike, few for the
    rest."""
    few = [(None, False), ("lossless", True), ("mesa8", False), ("mesa8-recompute", True)]
    more = [("lossless", False), ("mesa8", True), ("mesa8-recompute", False), ("paper", True)]
    if variant == "zero2":
        return [*few, ("paper", True)]
    return few + more if variant in ("ddp", "fsdp", "zero3") else few


def steps_seen(model):
    """How many optimisation steps a wrapped model has counted; None for a plain one."""
    entry = model.__dict__.get("_mesa_train")
    return None if entry is None else entry.installed.steps.count
