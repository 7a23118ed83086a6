"""One rank of a run that fits hashes: rank 1 has other weights of the hash and other images."""

import timm
import torch
import torch.distributed as dist

import mesa_train.models
from mesa_train.models.ecoformer import fit_hashes


def small():
    options = {"widths": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)}
    return timm.create_model("ecoformer_pvt_v2_b0", num_classes=10, **options)


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = small()
    fits = fit_hashes(model, torch.randn(1, 3, 80, 80), steps=2)
    torch.save((len(fits), dict(model.named_buffers())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


assert mesa_train.models is not None
