"""Inputs of checkpoints as codes: `Policy(checkpoint_inputs=...)` and `mesa_train.checkpoint`."""

import copy

import pytest
import torch
from checkpoint_tools import KINDS, module_route
from integration_models import EIGHT, Net, batch, distance, step
from torch import nn

import mesa_train


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
    with pytest.raises(ValueError, match="bits must be one of 8, 6, 5, 4, 3, 2, 32, got 7"):
        mesa_train.checkpoint(torch.sin, torch.ones(3), bits=7)
    with pytest.raises(ValueError, match=r"bits must be one of 8, .*, got 4\.0"):
        mesa_train.checkpoint(torch.sin, torch.ones(3), bits=4.0)
    with pytest.raises(ValueError, match=r"Policy\.checkpoint_inputs must be one of None, 8, 6, 5"):
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
