"""Selective checkpoints: what they keep is kept as codes, and nothing is coded twice."""

import collections
import copy
import functools
import warnings

import pytest
import torch
from checkpoint_tools import PRESETS, Under
from integration_models import BOUND, EIGHT, POLICIES, Block, Net, batch, distance, gradients, step
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mesa_train


def selective_route(keeps, seen):
    """The checkpoint keeps the outputs of operators whose name `keeps`, the rest is recomputed; `seen`
    notes operators."""

    def policy(context, function, *args, **kwargs):
        seen.append(str(function))
        kept = keeps(str(function))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


class Operations(TorchDispatchMode):
    """Counts operations that run, under a selective checkpoint those that it does not have already."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def coded(self):
        return sum(
            n for name, n in self.counts.items() if "mesa_train" in name and "encode" in name
        )


MATMULS = ("aten.mm.default", "aten.addmm.default")
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
KEEPS = {
    "matmuls": lambda name: name in MATMULS,
    "matmuls and attention": lambda name: name in (*MATMULS, ATTENTION),
    # What an unknown policy may do: it must not get at the codes.
    "everything": lambda name: True,
    "nothing": lambda name: False,
}


@PRESETS
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.compatibility("Activation checkpointing", "selective contexts that keep {keeps}")
def test_selective(keeps, preset):
    """The user's policy meets the operations that it met without us, and keeps what it kept; codes are
    made in the second pass alone, out of its sight."""
    runs = []
    for policy in (None, POLICIES[preset]):
        seen = []
        # Dropout writes in place, which PyTorch refuses where all is kept.
        drop = 0.0 if keeps == "everything" else 0.2
        model = Net(drop=drop, around=selective_route(KEEPS[keeps], seen))
        if policy is not None:
            mesa_train.wrap(model, policy)
        torch.manual_seed(1)
        with Operations() as first:
            loss = model(batch()).square().mean()
        with Operations() as second:
            loss.backward()
        runs.append((loss.detach(), gradients(model), collections.Counter(seen)))
    (loss, expected, plains), (found, got, ours) = runs
    assert torch.equal(found, loss)
    assert distance(got, expected) <= BOUND[preset]
    assert not any(name.startswith("mesa_train.") for name in ours)
    for name in (*MATMULS, ATTENTION, "aten.native_layer_norm.default", "aten.gelu.default"):
        assert ours[name] == plains[name]
        if preset == "mesa8" and KEEPS[keeps](name) and name != "aten.mm.default":
            assert not second.counts[name]  # but in the backward's own products
    # Outside of the regions: the stem's input, the last norm, the head's input. In each of three blocks:
    # two norms; with q, k, v and what attention and activation read; without, attention's output alone;
    # and dropout's bits.
    leaves = {"mesa8": 7, "mesa8-recompute": 3}.get(preset, 0)
    assert first.coded() == (3 if leaves else 0)
    assert second.coded() == 3 * (leaves + (keeps != "everything"))


def test_selective_and_fused_forwards():
    """Both passes call PyTorch's own functions, which is what the policy knows."""
    policy = mesa_train.Policy(min_bytes=0, forward="fused")
    plain = step(Net(drop=0.0), batch())
    route = selective_route(KEEPS["everything"], [])
    # PyTorch 2.14 says that what it keeps by itself bypasses hooks, here those that count bytes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*selective activation checkpoint", FutureWarning)
        found = step(mesa_train.wrap(Net(drop=0.0, around=route), policy), batch())
    assert distance(found[2], plain[2]) <= BOUND["mesa8"]


def test_selective_inside_a_plain_checkpoint_and_twice():
    def around(block, x):
        inner = selective_route(KEEPS["matmuls"], [])
        return checkpoint(lambda t: inner(block, t), x, use_reentrant=False)

    plain = Net(drop=0.0, around=around)
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    for m in (plain, model):
        m(batch()).square().mean().backward()
    assert distance(gradients(model), gradients(plain)) <= BOUND["mesa8"]
    assert not _get_current_dispatch_mode_stack()


def test_other_modes_stay_on_while_codes_are_made():
    """Beneath a selective checkpoint's and above it."""
    model, x = mesa_train.wrap(Block(), EIGHT), batch(inputs=32).requires_grad_()
    below, above = Operations(), Operations()
    with below:
        output = selective_route(KEEPS["nothing"], [])(Under(model, above), x)
        output.sum().backward()
    assert below.coded() == above.coded() > 4
