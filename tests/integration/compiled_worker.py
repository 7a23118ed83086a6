"""Worker: torch.compile with inductor under DDP (whole) and FSDP2 (block by block) on two CPU processes,
without mesa_train and with it, beside the same setups uncompiled."""

import functools
import sys

import torch
from integration_models import Net, batch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worker_tools import run, share, start, train, wrapped

# One block: compiling is what takes the time.
DEPTH = 1


def ddp(model, compiled):
    parallel = DistributedDataParallel(model)
    return torch.compile(parallel) if compiled else parallel


def ddp_regional(model, compiled):
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    return DistributedDataParallel(model)


def fsdp(model, compiled):
    for block in model.blocks:
        if compiled:
            block.compile(fullgraph=True)
        fully_shard(block)
    return fully_shard(model)


SETUPS = {"ddp whole": ddp, "ddp regional": ddp_regional, "fsdp regional": fsdp}


def setup(make, preset, compiled):
    """Losses of three steps, and the bytes saved in a step after those."""
    torch._dynamo.reset()
    model = wrapped(Net(depth=DEPTH, drop=0.0), preset)
    forward = make(model, compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def advance():
        optimizer.step()
        optimizer.zero_grad()

    # Compiled before anything counts bytes.
    forward(share(batch())).square().mean().backward()
    optimizer.zero_grad()
    losses, _ = train(forward, lambda loss: loss.backward(), advance)
    _, kept = train(forward, lambda loss: loss.backward(), advance)
    return {"losses": losses, "kept": kept}


def checks():
    found = {}
    for name, make in SETUPS.items():
        for preset in (None, "mesa8"):
            for compiled in (False, True):
                extent = "compiled" if compiled else "eager"
                found[f"{name}/{preset}/{extent}"] = functools.partial(
                    setup, make, preset, compiled
                )
    return found


if __name__ == "__main__":
    start()
    run(checks(), sys.argv[1])
