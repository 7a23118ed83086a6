"""Weights by rule of the official keys, and comparisons (see tests/golden/README.md)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[2] / "golden"


def arrays(name):
    with np.load(FOLDER / f"{name}_golden.npz") as file:
        return dict(file)


def keys(name):
    return json.loads((FOLDER / f"{name}_keys.json").read_text())


def value_of(key, shape):
    """The value of an official key, from the key and its shape."""
    parent, leaf = ["", *key.split(".")][-2:]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    normal = np.random.RandomState(zlib.crc32(key.encode("ascii"))).randn(*shape)
    if leaf == "running_var":
        value = 1 + np.abs(0.1 * normal)
    elif len(shape) >= 2:
        value = normal / math.sqrt(math.prod(shape[1:]))
    elif leaf == "weight" and parent.startswith(("norm", "bn")):
        value = 1 + 0.1 * normal
    else:
        value = 0.1 * normal
    return torch.from_numpy(np.asarray(value).astype(np.float32))


def state(name):
    """The official state dict of a model, by the rule."""
    return {key: value_of(key, shape) for key, shape in keys(name)["keys"]}


def images(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


def stat(x):
    x = x.detach().double()
    return [x.mean().item(), x.std(correction=0).item(), x.abs().max().item()]


def close(actual, expected, atol=0.0, rtol=0.0):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=rtol)
