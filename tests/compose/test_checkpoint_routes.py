"""Activation checkpointing by every route users take: the gradients of the same setup without
mesa_train, the same bytes kept, no coding in the first pass, and no state changed by the recompute."""

import collections
import copy
import functools
import warnings

import pytest
import timm
import torch
from compose_models import BOUND, EIGHT, POLICIES, Block, Net, batch, distance, gradients, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import mesa_train

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
PRESETS = pytest.mark.parametrize("preset", POLICIES)


def module_route(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


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


class Sequential(Net):
    reentrant = False

    def forward(self, x):
        x = checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=self.reentrant)
        return self.head(self.norm(x).mean(1))


def selective_route(keeps, seen):
    """The checkpoint keeps the outputs of operators whose name `keeps`, the rest is recomputed; `seen`
    notes operators."""

    def policy(context, function, *args, **kwargs):
        seen.append(str(function))
        kept = keeps(str(function))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


ROUTES = {
    "module": module_route,
    "closure": closure_route,
    "parts": parts_route,
    "no random state": no_random_state_route,
}


def built(route, reentrant):
    if route == "sequential":
        model = Sequential()
        model.reentrant = reentrant
        return model
    return Net(around=ROUTES[route](reentrant))


def compared(model, inputs, preset):
    """Both steps' kept bytes, without and with mesa_train, their losses and gradients compared."""
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

    compared(Net(around=around), [batch()], preset)


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
    # PyTorch says that what it keeps by itself bypasses hooks, here those that count bytes.
    with pytest.warns(FutureWarning, match="selective activation checkpoint"):
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


class Under(nn.Module):
    def __init__(self, inner, mode):
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x):
        with self.mode:
            return self.inner(x)


@PRESETS
@pytest.mark.compatibility("Activation checkpointing", "timm set_grad_checkpointing")
def test_timm(preset):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    model.set_grad_checkpointing()
    plain, found = compared(model, [torch.randn(4, 3, 32, 32)], preset)
    assert found < plain


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


# --- coded inputs ---


@KINDS
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.compatibility(
    "Activation checkpointing", "inputs as codes: Policy(checkpoint_inputs), {kind}"
)
def test_checkpoint_inputs_as_codes(reentrant, bits):
    """A policy's field codes what torch's own checkpoint keeps of a block: its input."""
    policy = mesa_train.Policy(min_bytes=0, checkpoint_inputs=bits)
    model = Net(around=module_route(reentrant))
    plain = step(copy.deepcopy(model), batch())
    whole = step(mesa_train.wrap(copy.deepcopy(model), EIGHT), batch())
    coded = step(mesa_train.wrap(model, policy), batch())
    assert torch.equal(coded[1], plain[1])
    tensor = batch().shape[0] * 16 * 32
    # Three block inputs: float32, or codes with four bytes of scale for each token's 32 elements.
    assert whole[0] - coded[0] == 3 * (4 * tensor - (tensor * bits // 8 + 4 * tensor // 32))
    # 8 bits a block input: 0.6 % here; 4 bits are 16 times coarser.
    assert distance(coded[2], plain[2]) <= {8: 0.02, 4: 0.2}[bits]


@KINDS
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.compatibility(
    "Activation checkpointing", "inputs as codes: mesa_train.checkpoint, {kind}"
)
def test_our_checkpoint(wrapped, reentrant):
    def around(block, x):
        return mesa_train.checkpoint(block, x, use_reentrant=reentrant)

    x = batch(rows=16)
    plain = step(Net(around=module_route(reentrant)), x)
    model = Net(around=around)
    found = step(mesa_train.wrap(model, EIGHT) if wrapped else model, x)
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], plain[2]) <= 0.02
    tensor = 16 * 16 * 32
    if wrapped:
        plain = step(mesa_train.wrap(Net(around=module_route(reentrant)), EIGHT), x)
    assert plain[0] - found[0] == 3 * (4 * tensor - (tensor + 4 * tensor // 32))


def test_an_input_with_a_stash_keeps_nothing():
    """A norm's output that enters a checkpoint is rebuilt from what the norm keeps."""

    class Behind(nn.Module):
        def __init__(self, run):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.GELU())
            self.run = run

        def forward(self, x):
            return self.run(self.mlp, self.norm(x))

    x = batch(inputs=32).requires_grad_()
    found = step(mesa_train.wrap(Behind(mesa_train.checkpoint), EIGHT), x)
    tokens = x.shape[0] * x.shape[1]
    assert found[0] == tokens * (32 + 4 + 4)  # codes and scale of x_hat, rstd


def test_masks_and_integers_enter_a_checkpoint_as_they_are():
    x = batch(inputs=32).requires_grad_()
    mask = torch.full((16, 16), float("-inf")).triu(1)
    index = torch.arange(16)

    def attend(t, mask, index, *, scale):
        t = t[:, index]
        return nn.functional.scaled_dot_product_attention(t, t, t, mask, scale=scale)

    expected = torch.autograd.grad(attend(x, mask, index, scale=0.2).square().sum(), x)[0]
    output = mesa_train.checkpoint(attend, x, mask, index, scale=0.2)
    found = torch.autograd.grad(output.square().sum(), x)[0]
    assert found.isfinite().all()
    assert distance(found, expected) < 0.02


def test_wrong_bits():
    with pytest.raises(ValueError, match="bits must be one of 8, 4, 2, 32, got 3"):
        mesa_train.checkpoint(torch.sin, torch.ones(3), bits=3)
    with pytest.raises(ValueError, match=r"Policy\.checkpoint_inputs must be one of None, 8, 4, 2"):
        mesa_train.Policy(checkpoint_inputs=True)


def test_a_written_tensor_is_reported_while_inputs_are_coded():
    """Hooks take PyTorch's own check of versions over."""
    x = torch.randn(2, 4, requires_grad=True)
    policy = mesa_train.Policy(checkpoint_inputs=8, overrides={"fallback": {"enabled": False}})
    with mesa_train.compress(policy):
        y = x.exp()
        z = y.sin()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        z.sum().backward()
