"""What each rank of test_open_world_ranks.py runs: two steps of the detector on its share of the images."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from open_world_cases import batch, detector
from timm.utils.model import freeze_batch_norm_2d

from mesa_train.models.moco.backward import average_gradients


def steps(rank, world):
    """Losses of two steps, averaged over ranks, and the state after them."""
    torch.manual_seed(0)
    model = detector("litv2_tiny", queue_size=3)
    model.heads.clustering.start.fill_(0)
    # LITv2's batch norms would have the statistics of one image, or of two.
    model.backbone.body = freeze_batch_norm_2d(model.backbone.body)
    # The sampler draws the first candidates on any number of ranks.
    torch.randperm = lambda count, device=None, **kwargs: torch.arange(count, device=device)
    model.rpn.fg_bg_sampler.batch_size_per_image = 8
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sizes = ((96, 128),) * 2
    images, targets = batch((2, 2), sizes)
    share = slice(rank, rank + 1) if world > 1 else slice(None)
    found = []
    for _ in range(2):
        losses = model(images[share], targets[share])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        average_gradients(model)
        optimizer.step()
        means = torch.stack([losses[name].detach() for name in sorted(losses)])
        if world > 1:
            dist.all_reduce(means)
        found.append(dict(zip(sorted(losses), (means / world).tolist(), strict=True)))
    return {"losses": found, "state": dict(model.heads.clustering.named_buffers())}


def deferred(rank, world):
    """Losses of four steps of two micro-batches, one for each rank or both in one process."""
    torch.manual_seed(0)
    model = detector("litv2_tiny", queue_size=3, update_every=2)
    model.heads.clustering.deferred = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, targets = batch((2, 3))
    found = []
    for _ in range(4):
        total = 0.0
        optimizer.zero_grad()
        for turn in range(rank, 2, world):
            torch.manual_seed(turn)
            loss = sum(model([images[turn]], [targets[turn]]).values())
            (loss * world / 2).backward()
            total = total + loss.detach() / 2
        average_gradients(model)
        optimizer.step()
        model.heads.clustering.commit()
        if world > 1:
            dist.all_reduce(total)
        found.append(total.item())
    return {"losses": found, "state": dict(model.heads.clustering.named_buffers())}


def run(rank, world):
    # `steps` replaces the sampler's draws, so it comes last.
    return {"deferred": deferred(rank, world), "steps": steps(rank, world)}


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(run(rank, dist.get_world_size()), Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
