"""Checkpoints around parts of a wrapped model, and several backwards into one gradient."""

import dataclasses

import pytest
import timm
import torch
from wrap_helpers import EIGHT, LOSSLESS, Checkpointed, close, gradients, images, same, saved_bytes

import mesa_train
from mesa_train import PRESETS, Policy, compress
from mesa_train.stash import stash


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("preset", ["mesa8", "mesa4", "mesa8-recompute", "lossless", "paper"])
def test_checkpoints_of_blocks_give_the_same_gradients_and_keep_less(kind, preset):
    policy = dataclasses.replace(PRESETS[preset], min_bytes=0)
    unchecked = mesa_train.wrap(Checkpointed(None), policy)
    checked = mesa_train.wrap(Checkpointed(kind), policy)
    size, expected = saved_bytes(lambda: unchecked(images()))
    smaller, found = saved_bytes(lambda: checked(images()))
    assert torch.equal(found, expected)
    # A checkpoint keeps a block's input whole, which is more than what "linear" keeps of a block. What a non-reentrant
    # one keeps goes to its own hooks, not to these.
    if policy.recompute != "linear":
        assert smaller < size
    for output, model in ((expected, unchecked), (found, checked)):
        del output
        model.zero_grad()
        model(images()).square().sum().backward()
    for p, q in zip(checked.parameters(), unchecked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("part", ["mlp", "function"])
@pytest.mark.parametrize("preset", ["mesa8", "mesa8-recompute"])
def test_checkpoints_of_parts_recompute_what_they_recorded(kind, part, preset):
    """Inside a checkpoint nothing may depend on what is known outside: the recompute does not know it."""
    policy = dataclasses.replace(PRESETS[preset], min_bytes=0)
    plain = Checkpointed(None, part)
    checked = mesa_train.wrap(Checkpointed(kind, part), policy)
    expected, found = gradients(plain, images()), gradients(checked, images())
    assert close(found, expected, 0.03)
    lossless = mesa_train.wrap(checked, LOSSLESS)
    assert close(gradients(lossless, images()), expected, 1e-4)


def test_checkpoints_under_compress():
    plain, model = Checkpointed(None), Checkpointed("non-reentrant")
    expected = gradients(plain, images())
    model.zero_grad()
    with compress(EIGHT):
        output = model(images())
    output.square().sum().backward()
    assert close([p.grad for p in model.parameters()], expected, 0.03)


def test_repeated_matmuls_are_freed_after_the_backward():
    for kind in (None, "reentrant", "non-reentrant"):
        model = mesa_train.wrap(Checkpointed(kind), Policy(min_bytes=0, recompute="linear"))
        gradients(model, images())
        assert not stash.backward_cache.values


def test_timms_own_checkpointing():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5
    )
    mesa_train.wrap(model, EIGHT)
    expected = gradients(model, images())
    model.set_grad_checkpointing(True)
    assert same(gradients(model, images()), expected)


def test_gradient_accumulation():
    plain, model = Checkpointed(None), mesa_train.wrap(Checkpointed(None), LOSSLESS)
    for m in (plain, model):
        for seed in (1, 2):
            m(images(seed)).square().mean().backward()
    assert close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-5)
    model = mesa_train.wrap(Checkpointed(None), EIGHT)
    outputs = [model(images(seed)).square().mean() for seed in (1, 2)]
    for output in reversed(outputs):
        output.backward()
    assert close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 0.03)
