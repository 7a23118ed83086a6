"""Weights by rule, and what the authors' code makes of them (see tests/golden/README.md)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[2] / "golden"


def arrays(name):
    return np.load(FOLDER / f"{name}_golden.npz")


def keys(name):
    return json.loads((FOLDER / f"{name}_keys.json").read_text())


def fill(module):
    """Give every parameter and running statistic the value that its key and shape determine."""
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        normal = np.random.RandomState(zlib.crc32(key.encode("ascii"))).randn(*tensor.shape)
        parent, leaf = ["", *key.split(".")][-2:]
        if leaf == "running_var":
            value = 1 + np.abs(0.1 * normal)
        elif tensor.dim() >= 2:
            value = normal / math.sqrt(math.prod(tensor.shape[1:]))
        elif leaf == "weight" and parent.startswith("norm"):
            value = 1 + 0.1 * normal
        else:
            value = 0.1 * normal
        tensor.copy_(torch.from_numpy(value.astype(np.float32)))
    return module


def images(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))
