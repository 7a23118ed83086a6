"""What each rank of test_ranks.py runs: the golden loss, and a whole step of a tiny model."""

import os
import sys
from pathlib import Path

import moco_cases as cases
import torch
import torch.distributed as dist

from mesa_train.models.moco import backward_by_view, moco_loss
from mesa_train.models.moco.backward import average_gradients
from mesa_train.models.moco.batch_norm import synchronise


def golden_loss(case, rank):
    golden = cases.arrays("loss")
    world, n, dim, seed = (int(golden[f"{case}_{k}"]) for k in ("world", "n", "dim", "seed"))
    f = cases.normal(seed, 4, world, n, dim, dtype="float64")
    q1, q2, k1, k2 = f[0], f[1], f[2] + 0.8 * f[1], f[3] + 0.8 * f[0]
    q1, q2 = (q[rank].clone().requires_grad_() for q in (q1, q2))
    t = float(golden[f"{case}_T"])
    one, two = moco_loss(q1, k2[rank], t), moco_loss(q2, k1[rank], t)
    (one + two).backward()
    return {"q1k2": one.item(), "q2k1": two.item(), "grad_q1": q1.grad, "grad_q2": q2.grad}


def whole_step(rank, chunk, joint=False):
    model = synchronise(cases.tiny(), torch.device("cpu"))
    x1, x2 = (x.chunk(dist.get_world_size())[rank] for x in cases.views())
    if joint:
        loss = model(x1, x2, 0.9)
        loss.backward()
    else:
        loss = backward_by_view(model, x1, x2, 0.9, chunk=chunk)
    average_gradients(model)
    loss = loss.detach()
    dist.all_reduce(loss)
    return {
        "loss": loss / dist.get_world_size(),
        "gradients": cases.gradients(model),
        "buffers": dict(model.named_buffers()),
    }


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {case: golden_loss(case, rank) for case in ("w2", "w2T1")}
    results["step"] = whole_step(rank, None)
    results["joint"] = whole_step(rank, None, joint=True)
    results["chunks"] = whole_step(rank, 3)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
