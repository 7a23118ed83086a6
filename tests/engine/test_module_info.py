"""PyTorch's own samples of every module, wrapped: outputs bit for bit, hooks called alike, lossless gradients to
rounding and 8-bit ones within a bound, in training and in evaluation mode."""

import itertools

import pytest
import torch
from seeding import seed_torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import mesa_train
from mesa_train import Policy

LOSSLESS, EIGHT = Policy(bits=32, min_bytes=0), Policy(min_bytes=0)
MOST = 2  # samples of a module and mode
# Largest error of an 8-bit gradient, relative L2. Inputs lie within +-9, which saturates softmaxes and gates.
BOUND = 0.2
# Per element; a smaller gradient is one of a saturated sample.
LEAST = 0.1

MODULES = [info for info in module_db if issubclass(info.module_cls, nn.Module)]


def inputs_of(info, training, requires_grad=True):
    return itertools.islice(
        info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=requires_grad, training=training
        ),
        MOST,
    )


def activation(value):
    """No leaf: a leaf that needs a gradient would be taken for a parameter, which is never coded."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return value
    return value * 1


def run(info, sample, training, policy):
    """(outputs, gradients of the inputs and parameters, how often each kind of hook was called)."""
    seed_torch(0)
    made = sample.constructor_input
    module = info.module_cls(*made.args, **made.kwargs).to(torch.float64).train(training)
    called = []
    module.register_forward_pre_hook(lambda m, args: called.append("before"))
    module.register_forward_hook(lambda m, args, output: called.append("after"))
    module.register_full_backward_hook(lambda m, into, out: called.append("backward"))
    if policy is not None:
        mesa_train.wrap(module, policy)
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    leaves = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    seed_torch(1)
    args, kwargs = tree_map(activation, (args, kwargs))
    output = module(*args, **kwargs)
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    trained = [t for t in outputs if t.requires_grad]
    if not trained:
        return outputs, [], called
    weights = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(2), dtype=t.dtype)
        for t in trained
    ]
    return outputs, torch.autograd.grad(trained, leaves, weights, allow_unused=True), called


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=[info.name for info in MODULES])
@pytest.mark.filterwarnings("ignore")
def test_module(info, training):
    if not info.train_and_eval_differ and not training:
        return
    for sample in inputs_of(info, training):
        expected, plain, hooks = run(info, sample, training, None)
        for policy in (LOSSLESS, EIGHT):
            outputs, found, called = run(info, sample, training, policy)
            assert called == hooks
            for f, e in zip(outputs, expected, strict=True):
                torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)
            for f, e in zip(found, plain, strict=True):
                assert (f is None) == (e is None)
                if e is None:
                    continue
                if policy is LOSSLESS:
                    torch.testing.assert_close(f, e, equal_nan=True)
                elif e.isfinite().all() and e.numel():
                    size = max(e.norm().item(), LEAST * e.numel() ** 0.5)
                    assert (f - e).norm() <= BOUND * size
