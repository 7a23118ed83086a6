"""Attention that a model writes out: under recompute its weights are rebuilt from queries and keys."""

import copy

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from stash_helpers import implementation
from torch import nn

from mesa_train import Policy, footprint, wrap
from mesa_train.measure.step import relative_error
from mesa_train.stash import stash

WINDOWS, HEADS, TOKENS, WIDTH = 8, 4, 36, 32
EXACT = Policy(bits=32, recompute="linear", min_bytes=0)
RECOMPUTE = Policy(recompute="linear", min_bytes=0)


class WindowAttention(nn.Module):
    """As in MONAI's and torchvision's Swin: q * scale, matmul, relative positions, mask, softmax, matmul."""

    def __init__(self, in_place=False, dropout=0.0, function=F.softmax):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.table = nn.Parameter(torch.randn(HEADS, 2 * TOKENS - 1))
        places = torch.arange(TOKENS)
        self.register_buffer("index", places[:, None] - places[None] + TOKENS - 1)
        self.in_place, self.dropout, self.function = in_place, dropout, function

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[:, self.index].unsqueeze(0)
        windows = len(mask)
        scores = scores.view(-1, windows, HEADS, TOKENS, TOKENS)
        if self.in_place:
            scores += mask[None, :, None]
            mask.mul_(2)
        else:
            scores = scores + mask[None, :, None]
        weights = self.function(scores.view(-1, HEADS, TOKENS, TOKENS), dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def inputs(dtype=torch.float32):
    seed_torch(1)
    mask = torch.zeros(2, TOKENS, TOKENS, dtype=dtype)
    mask[1, :, 20:] = -100
    return torch.randn(4 * WINDOWS, TOKENS, WIDTH, dtype=dtype), mask


def gradients(model, policy, dtype):
    model = copy.deepcopy(model).to(dtype).train()
    if policy is not None:
        wrap(model, policy)
    seed_torch(3)
    output = model(*inputs(dtype))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    assert not stash.backward_cache.values
    return output.detach(), [p.grad for p in model.parameters()]


@pytest.fixture(params=["native", "python"], autouse=True)
def rows(request):
    yield from implementation(request.param)


MODELS = {
    "plain": {},
    "in place": {"in_place": True},
    "dropout": {"dropout": 0.2},
    "Tensor.softmax": {"function": torch.Tensor.softmax},
}


@pytest.mark.parametrize("case", MODELS)
def test_gradients_equal_plains(case):
    seed_torch(0)
    model = WindowAttention(**MODELS[case])
    expected = gradients(model, None, torch.float64)
    found = gradients(model, EXACT, torch.float64)
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_codes_of_the_weights_are_not_kept():
    """They were a third of what SwinUNETR keeps, and three quarters of a video Swin."""
    seed_torch(0)
    model = WindowAttention()
    kept = {
        name: footprint(model, inputs(), policy=policy)
        for name, policy in (("mesa8", Policy(min_bytes=0)), ("recompute", RECOMPUTE))
    }
    codes = 4 * WINDOWS * HEADS * TOKENS * (TOKENS + 4)
    assert kept["mesa8"].by_operator["softmax"] == codes
    # Instead: copies of the relative positions and of the mask.
    small = (HEADS + 2) * TOKENS * TOKENS * 4
    assert kept["recompute"].by_operator["softmax"] == small
    assert kept["recompute"].saved_bytes <= kept["mesa8"].saved_bytes - codes + small
    plain = gradients(model, None, torch.float32)
    for policy in (Policy(min_bytes=0), RECOMPUTE):
        assert relative_error(gradients(model, policy, torch.float32)[1], plain[1]) < 0.01


def test_a_term_as_large_as_the_scores_is_not_copied():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.qk = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x, bias):
            q, k = self.qk(x).chunk(2, -1)
            return (q @ k.transpose(1, 2) + bias).softmax(-1)

    x = torch.randn(8, TOKENS, WIDTH)
    rows = footprint(Biased(), (x, torch.randn(8, TOKENS, TOKENS)), policy=RECOMPUTE).by_operator
    assert rows["softmax"] == 8 * TOKENS * (TOKENS + 4)
    rows = footprint(Biased(), (x, torch.randn(1, TOKENS, TOKENS)), policy=RECOMPUTE).by_operator
    assert rows["softmax"] == TOKENS * TOKENS * 4
