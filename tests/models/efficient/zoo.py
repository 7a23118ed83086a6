"""Weights by rule, and comparisons with what the authors' code makes of them (see tests/golden/README.md)."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "golden"
CONSTANT = ("relative_position_index", "attn_mask", "projection_matrix")


def arrays(name):
    with np.load(FOLDER / f"{name}_golden.npz") as file:
        return dict(file)


def value_of(key, shape, exceptions=None):
    """The value of a key as float32. `exceptions` maps endings of keys to functions of the normal draws."""
    normal = np.random.RandomState(zlib.crc32(key.encode("ascii"))).randn(*shape)
    leaf = key.rpartition(".")[2]
    special = [rule for ending, rule in (exceptions or {}).items() if key.endswith(ending)]
    if special:
        value = special[0](normal)
    elif leaf == "running_var":
        value = 1 + np.abs(0.1 * normal)
    elif len(shape) == 3 and shape[0] == 1:
        value = 0.2 * normal
    elif len(shape) >= 2:
        value = normal / math.sqrt(math.prod(shape[1:]))
    elif leaf == "weight":
        value = 1 + 0.1 * normal
    else:
        value = 0.1 * normal
    return torch.from_numpy(np.asarray(value).astype(np.float32))


def fill(module, exceptions=None):
    """Give every parameter and running statistic the value that its key and shape determine."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not key.endswith(CONSTANT):
            tensor.copy_(value_of(key, tensor.shape, exceptions))
    return module


def images(batch, size, seed=0):
    normal = np.random.RandomState(seed).randn(batch, 3, size, size)
    return torch.from_numpy(normal.astype(np.float32))


def probe(batch):
    """The direction in logits of which the gradients are."""
    normal = np.random.RandomState(1).randn(batch, 1000) / math.sqrt(1000)
    return torch.from_numpy(normal.astype(np.float32))


def labels(batch):
    return torch.from_numpy(np.random.RandomState(3).dirichlet([0.05] * 1000, size=batch))


def close(actual, expected, atol, rtol=0.0):
    np.testing.assert_allclose(actual.detach().numpy(), expected, atol=atol, rtol=rtol)


def check_gradients(model, images, reference, prefix="", rel=1e-9):
    """Compare the gradients of a model, after a backward, with `{prefix}grad_*` of a file."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    names = reference[f"{prefix}grad_keys"].tolist()
    assert sorted(grads) == sorted(names)
    norms, sums = reference[f"{prefix}grad_l2"], reference[f"{prefix}grad_sum"]
    for name, norm, total in zip(names, norms, sums, strict=True):
        grad = grads[name]
        grad = torch.zeros(1) if grad is None else grad
        # A gradient that is 0 in exact arithmetic, as a key's bias, is rounding in both.
        floor = 1e-4 * rel
        assert grad.norm().item() == pytest.approx(norm, rel=rel, abs=floor), name
        assert grad.sum().item() == pytest.approx(total, rel=rel, abs=rel * norm * 30 + floor), name
    total = float(reference[f"{prefix}grad_input_l2"])
    assert images.grad.norm().item() == pytest.approx(total, rel=rel)


def check_stats(model, run, reference, prefix="", atol=1e-9):
    """Run the model and compare the outputs of its modules with `{prefix}stat_*` of a file."""
    outputs, hooks = {}, []
    names = reference[f"{prefix}stat_names"].tolist()
    modules = dict(model.named_modules())

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = output.detach()

        return hook

    for name in names:
        if name in modules:
            hooks.append(modules[name].register_forward_hook(keep(name)))
    result = run()
    for hook in hooks:
        hook.remove()
    rows = dict(zip(names, reference[f"{prefix}stat_mean_std_absmax"], strict=True))
    for name, value in outputs.items():
        value = value.double()
        numbers = [value.mean(), value.std(correction=0), value.abs().max()]
        np.testing.assert_allclose(numbers, rows[name], atol=atol, rtol=1e-9, err_msg=name)
    return result, set(outputs), set(names)
