"""A small model and its batches, for tests of captured steps."""

import torch
from torch import nn

import mesa_train
from mesa_train import Policy

POLICIES = {
    "plain": None,
    "mesa8": Policy(min_bytes=0),
    "mesa4": Policy(bits=4, min_bytes=0),
}


def network(policy="plain", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 4)
    )
    return model if POLICIES[policy] is None else mesa_train.wrap(model, POLICIES[policy])


def batches(count, rows=8, seed=1):
    made = torch.Generator().manual_seed(seed)
    sizes = [rows] * count if isinstance(rows, int) else rows
    return [
        (torch.randn(n, 6, generator=made), torch.randint(4, (n,), generator=made)) for n in sizes
    ]
