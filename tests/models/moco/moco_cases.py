"""Weights by rule and the tiny model of the golden step (see tests/golden/README.md)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from mesa_train.models.moco import MoCo, MoCoViT

FOLDER = Path(__file__).resolve().parents[2] / "golden"


def arrays(name):
    with np.load(FOLDER / f"mocov3_{name}_golden.npz") as file:
        return dict(file)


def keys(name):
    return json.loads((FOLDER / f"mocov3_{name}_keys.json").read_text())


def fill(module):
    """Give every parameter and running statistic the value that its key and shape determine."""
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or key.endswith("pos_embed"):
            continue
        normal = np.random.RandomState(zlib.crc32(key.encode("ascii"))).randn(*tensor.shape)
        leaf = key.rpartition(".")[2]
        if leaf == "running_var":
            value = 1 + np.abs(0.1 * normal)
        elif tensor.dim() >= 2:
            value = normal / math.sqrt(math.prod(tensor.shape[1:]))
        elif leaf == "weight":
            value = 1 + 0.1 * normal
        else:
            value = 0.1 * normal
        tensor.copy_(torch.from_numpy(value.astype(np.float32)))
    return module


def normal(seed, *shape, dtype=np.float32):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(dtype))


def tiny(dtype=torch.float64, **changes):
    """The model of the golden step."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    encoder = MoCoViT(**options | changes)
    model = MoCo(encoder, dim=16, hidden=64, temperature=0.2)
    return fill(model).to(dtype).train()


def views(count=8, size=32, dtype=torch.float64):
    return [normal(seed, count, 3, size, size).to(dtype) for seed in (10, 11)]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, wanted):
    """Relative L2 distance of two sets of gradients."""
    assert found.keys() == wanted.keys()
    difference = sum((found[n] - wanted[n]).square().sum() for n in wanted)
    return (difference / sum(g.square().sum() for g in wanted.values())).sqrt().item()
