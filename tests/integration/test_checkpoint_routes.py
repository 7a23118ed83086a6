"""Activation checkpointing by every route users take: the gradients of the same setup without
mesa_train, the same bytes saved, no coding in the first pass, and no state changed by the recompute."""

import copy
import dataclasses
import functools
import warnings

import pytest
import timm
import torch
from checkpoint_tools import KINDS, PRESETS, module_route
from integration_models import BOUND, POLICIES, Block, Net, batch, distance, gradients, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
)
from torch.utils.flop_counter import FlopCounterMode

import mesa_train


def closure_route(reentrant):
    return lambda block, x: checkpoint(lambda t: block(t) * 1.0, x, use_reentrant=reentrant)


def parts_route(reentrant):
    """Norm, Linear and activation of an MLP in a checkpoint, its second Linear behind it."""

    def around(block, x):
        def first(t):
            return block.act(block.fc1(block.norm2(t)))

        return x + block.fc2(checkpoint(first, x, use_reentrant=reentrant))

    return around


def no_random_state_route(reentrant):
    def around(block, x):
        block.drop.p = 0.0
        return checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False)

    return around


ROUTES = {
    "module": module_route,
    "closure": closure_route,
    "parts": parts_route,
    "no random state": no_random_state_route,
}


class Sequential(Net):
    reentrant = False

    def forward(self, x):
        x = checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=self.reentrant)
        return self.head(self.norm(x).mean(1))


def built(route, reentrant):
    if route == "sequential":
        model = Sequential()
        model.reentrant = reentrant
        return model
    return Net(around=ROUTES[route](reentrant))


def compared(model, inputs, preset):
    """Both steps' saved bytes, without and with mesa_train, their losses and gradients compared."""
    plain = step(copy.deepcopy(model), *inputs)
    found = step(mesa_train.wrap(copy.deepcopy(model), POLICIES[preset]), *inputs)
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], plain[2]) <= BOUND[preset]
    return plain[0], found[0]


@PRESETS
@KINDS
@pytest.mark.parametrize("route", [*ROUTES, "sequential"])
@pytest.mark.compatibility("Activation checkpointing", "torch, {route}, {kind}")
def test_torch(route, reentrant, preset):
    plain, found = compared(built(route, reentrant), [batch()], preset)
    # The recipe of one more tensor may be kept beside what the checkpoint keeps: a norm's reciprocal
    # standard deviations.
    assert 0 < found <= plain


@PRESETS
@KINDS
@pytest.mark.compatibility("Activation checkpointing", "the recompute changes no state, {kind}")
def test_the_recompute_changes_no_state(reentrant, preset):
    """Running averages move once per step, as without a checkpoint, and gradients follow them."""
    unchecked = mesa_train.wrap(Net(), POLICIES[preset])
    checked = mesa_train.wrap(Net(around=module_route(reentrant)), POLICIES[preset])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (unchecked, checked)]
    for number in range(3):
        found = [step(m, batch(seed=number), seed=number) for m in (unchecked, checked)]
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][2], found[1][2])
        for buffer, other in zip(unchecked.buffers(), checked.buffers(), strict=True):
            assert torch.equal(buffer, other)
        for optimizer in optimizers:
            optimizer.step()


class Encodes(TorchDispatchMode):
    """Counts calls of our kernels that make codes."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.calls += name.startswith("mesa_train.") and ("encode" in name or "positive" in name)
        return func(*args, **(kwargs or {}))


@KINDS
@pytest.mark.parametrize("preset", ["mesa8", "mesa8-recompute"])
@pytest.mark.compatibility("Activation checkpointing", "nothing coded in the first pass, {kind}")
def test_nothing_is_coded_in_the_first_pass(reentrant, preset):
    """And in the recompute what an unchecked forward codes."""

    class Masked(Block):
        def forward(self, x):
            return super().forward(x).relu().exp().clamp(0, 9)

    model = mesa_train.wrap(nn.Sequential(Masked(), Masked()), POLICIES[preset])
    x = batch(inputs=32).requires_grad_()
    with Encodes() as unchecked:
        model(x)
    assert unchecked.calls > 8
    with Encodes() as first_pass:
        output = checkpoint(model, x, use_reentrant=reentrant)
    assert first_pass.calls == 0
    with Encodes() as recompute:
        output.sum().backward()
    assert recompute.calls == unchecked.calls


@KINDS
def test_fused_forwards(reentrant):
    """Their first pass is PyTorch's own, which makes no codes; both passes save tensors of one kind."""
    policy = mesa_train.Policy(min_bytes=0, forward="fused")
    plain = step(Net(), batch())
    found = step(mesa_train.wrap(Net(around=module_route(reentrant)), policy), batch())
    assert distance(found[2], plain[2]) <= BOUND["mesa8"]


@PRESETS
@pytest.mark.compatibility("Activation checkpointing", "nested")
def test_nested(preset):
    def inner(block, x):
        return checkpoint(block, x, use_reentrant=False)

    def around(block, x):
        return checkpoint(lambda t: inner(block, t), x, use_reentrant=False)

    plain, found = compared(Net(around=around), [batch()], preset)
    assert found <= plain


@PRESETS
@pytest.mark.compatibility("Activation checkpointing", "retain_graph")
def test_twice_through_one_graph(preset):
    model = mesa_train.wrap(Net(around=module_route(False)), POLICIES[preset])
    loss = model(batch()).square().mean()
    loss.backward(retain_graph=True)
    once = gradients(model)
    model.zero_grad()
    loss.backward()
    assert torch.equal(gradients(model), once)


@PRESETS
@pytest.mark.compatibility("Activation checkpointing", "timm set_grad_checkpointing")
def test_timm(preset):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    model.set_grad_checkpointing()
    plain, found = compared(model, [torch.randn(4, 3, 32, 32)], preset)
    assert found < plain


def flops(model, x):
    """Of a step's matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lossless", "mesa8", "paper"])
@pytest.mark.parametrize("route", ["timm", "policy", *ROUTES])
@pytest.mark.compatibility("Activation checkpointing", "the recompute stops early, {route}")
def test_the_recompute_ends_where_pytorchs_does(route, preset):
    """At the last tensor that the region saves: a block's last product is not computed twice."""
    if route in ("timm", "policy"):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        x = torch.randn(2, 3, 32, 32)
    else:
        # Last in the block is a Linear, with a layer scale in front of the first sum alone.
        model, x = Net(around=ROUTES[route](False)), batch()
    without = flops(copy.deepcopy(model), x)
    policy = POLICIES[preset]
    if route == "policy":
        policy = dataclasses.replace(policy, checkpoint=("blocks.*",))
    ours = mesa_train.wrap(copy.deepcopy(model), policy)
    for m in (model, ours):
        if route == "timm" or (route == "policy" and m is model):
            m.set_grad_checkpointing()
    found, expected = flops(ours, x), flops(model, x)
    assert found == expected
    if route in ("timm", "policy"):
        # The last product is a third of a block's forward, which is a third of a step.
        assert 0 < found - without < 0.25 * without


@PRESETS
@KINDS
@pytest.mark.compatibility(
    "Activation checkpointing", "transformers gradient_checkpointing_enable, {kind}"
)
def test_transformers(reentrant, preset):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.1,
    )
    model = ViTForImageClassification(config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 has a new name for it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain, found = compared(model, [torch.randn(2, 3, 32, 32)], preset)
    assert found < plain


@PRESETS
@KINDS
@pytest.mark.compatibility("Activation checkpointing", "apply_activation_checkpointing, {kind}")
def test_fsdps_wrapper(reentrant, preset):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    kind = checkpoint_wrapper.CheckpointImpl.REENTRANT
    if not reentrant:
        kind = checkpoint_wrapper.CheckpointImpl.NO_REENTRANT
    make = functools.partial(checkpoint_wrapper.checkpoint_wrapper, checkpoint_impl=kind)

    def checkpointed(model):
        checkpoint_wrapper.apply_activation_checkpointing(
            model, make, lambda m: type(m).__name__ == "Block"
        )
        return model

    plain = step(checkpointed(Net()), batch())
    before = mesa_train.wrap(checkpointed(Net()), POLICIES[preset])
    after = checkpointed(mesa_train.wrap(Net(), POLICIES[preset]))
    for model in (before, after):
        found = step(model, batch())
        assert torch.equal(found[1], plain[1])
        assert found[0] <= plain[0]
        assert distance(found[2], plain[2]) <= BOUND[preset]
