"""A rebuilt tensor is freed when its last reader has read it, and no matmul runs again for that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stash_helpers import implementation
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mesa_train import Policy, footprint, unwrap, wrap
from mesa_train.measure.timeline import BACKWARD, timeline
from mesa_train.stash import stash
from mesa_train.stash.backward_cache import UseCount, UseHandle

WIDTH, TOKENS, RANK = 64, 128, 4
RECOMPUTE = Policy(min_bytes=0, recompute="linear")
LOSSLESS = Policy(min_bytes=0, recompute="linear", bits=32)


class Adapted(nn.Module):
    """A frozen Linear plus an adapter of low rank."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, RANK, bias=False)
        self.up = nn.Linear(RANK, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Weighted(Adapted):
    """As PEFT's DoRA: the output without its bias and the adapter's output, times trained magnitudes."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.magnitude = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x):
        base, scale = self.base(x), self.magnitude.view(1, -1)
        return base + (scale - 1) * (base - self.base.bias) + scale * self.up(self.down(x)) * 2.0


class Block(nn.Module):
    """A block of a ViT whose Linears are adapted, with frozen norms."""

    def __init__(self, adapted=True, adapter=Adapted):
        super().__init__()
        linear = adapter if adapted else nn.Linear
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if adapted:
            self.norm1.requires_grad_(False)
            self.norm2.requires_grad_(False)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def network(depth=2, adapted=True, adapter=Adapted):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(adapted, adapter) for _ in range(depth)]).train()


def tokens(leaf=True, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, TOKENS, WIDTH).requires_grad_(leaf)


@pytest.fixture(params=["native", "python"])
def rows(request):
    yield from implementation(request.param)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("policy", [RECOMPUTE, LOSSLESS], ids=["codes", "lossless"])
@pytest.mark.usefixtures("rows")
def test_nothing_waits_behind_a_block(adapted, policy):
    """Tensors beneath a shared one waited for a second reader until the backward ended."""
    model, left = wrap(network(adapted=adapted), policy), []
    x = hidden = tokens()
    for block in model:
        hidden.register_hook(lambda _: left.append(dict(stash.backward_cache.values)))
        hidden = block(hidden)
    hidden.square().mean().backward()
    assert x.grad is not None
    assert left == [{}, {}]


@pytest.mark.parametrize("method", ["mesa8-recompute", "mesa4-recompute"])
def test_a_block_adds_its_saved_bytes_to_the_peak_and_nothing_else(method):
    """The backward's peak is in the last block, where all other blocks keep what they saved."""
    peaks, saved = [], []
    for depth in (2, 4, 8):
        model = network(depth)
        step = timeline(model, tokens(), policy=Policy.preset(method))
        backward = [moment for moment in step.moments if moment.phase == BACKWARD]
        peak = max(backward, key=lambda moment: moment.peak_bytes)
        assert peak.module.startswith(f"{depth - 1}")
        peaks.append(peak.peak_bytes)
        saved.append(footprint(model, tokens(), policy=Policy.preset(method)).saved_bytes)
    assert peaks[1] - peaks[0] == saved[1] - saved[0]
    assert peaks[2] - peaks[1] == saved[2] - saved[1]


def test_adapters_need_no_more_than_a_stronger_preset_plus_a_block():
    peaks = {
        method: timeline(network(8), tokens(), policy=method).peak_bytes
        for method in ("plain", "mesa8", "mesa8-recompute")
    }
    rebuilt = 2 * TOKENS * WIDTH * 4 * (4 + 4)  # fc1's product and the adapter's
    assert peaks["mesa8-recompute"] <= peaks["mesa8"] + rebuilt < peaks["plain"]


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "all weights"])
@pytest.mark.usefixtures("rows")
def test_each_product_is_rebuilt_once(adapted):
    """FLOPs of the backward: plain's, and the Linears in front of attention and GELU once more."""
    model, flops = network(1, adapted), {}
    for name in ("plain", "recompute"):
        clone = copy.deepcopy(model)
        if name == "recompute":
            wrap(clone, RECOMPUTE)
        output = clone(tokens())
        with FlopCounterMode(display=False) as counter:
            output.square().mean().backward()
        flops[name] = counter.get_total_flops()
    rows_of_block = 2 * 2 * TOKENS
    products = [(WIDTH, 3 * WIDTH), (WIDTH, 4 * WIDTH)]
    expected = sum(rows_of_block * a * b for a, b in products)
    if adapted:
        expected += sum(rows_of_block * RANK * (a + b) for a, b in products)
        # `out.up` reads the product of `out.down`.
        expected += rows_of_block * RANK * WIDTH
    assert flops["recompute"] - flops["plain"] == expected


@pytest.mark.usefixtures("rows")
def test_a_retained_graph_rebuilds_and_frees_again():
    model = wrap(network(), LOSSLESS)
    x = tokens()
    loss = model(x).square().mean()
    found = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*found)
    assert not stash.backward_cache.values
    unwrap(model)
    (expected,) = torch.autograd.grad(model(x).square().mean(), x)
    torch.testing.assert_close(found[0], expected)


def test_a_source_has_one_reader_for_each_stash_that_has_readers():
    base = UseCount()
    first, second = UseCount((base,)), UseCount((base,))
    top = UseCount((first, second))
    handles = [UseHandle(top), UseHandle(top), UseHandle(first)]
    assert [c.count for c in (top, first, second, base)] == [2, 2, 1, 2]
    del handles[:2]
    assert [c.count for c in (top, first, second, base)] == [0, 1, 0, 1]
    handles.clear()
    assert [c.count for c in (top, first, second, base)] == [0, 0, 0, 0]


def test_the_last_reader_takes_all_dtypes():
    uses, found = UseCount(), []
    handles = [UseHandle(uses) for _ in range(3)]
    cache = stash.backward_cache

    class Readers(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            for dtype in (torch.float32, torch.bfloat16, torch.float32):
                value = cache.take(uses, dtype)
                found.append(value is not None)
                if value is None:
                    cache.offer(uses, dtype, grad.to(dtype))
            found.append(len(cache.values))
            return grad

    Readers.apply(torch.ones(1, requires_grad=True)).backward()
    assert found == [False, False, True, 0]
    assert len(handles) == 3
    # Outside of a backward nothing is cached.
    assert cache.take(uses, torch.float32) is None
    cache.offer(uses, torch.float32, torch.ones(1))
    assert not cache.values


@pytest.mark.parametrize("recompute", ["linear", "cheap"])
def test_a_frozen_weight_is_kept_once_under_autocast(recompute):
    """PyTorch saves a bfloat16 copy of every frozen weight, and the Python rows did too."""
    model, x = network(), tokens()
    policy = Policy(min_bytes=0, recompute=recompute)
    kept = {
        name: footprint(model, x, policy=policy, autocast=torch.bfloat16, fake=fake).saved_bytes
        for name, fake in (("real", False), ("fake", True))
    }
    assert kept["real"] == kept["fake"]
    weights = sum(p.nbytes // 2 for p in model.parameters() if p.dim() > 1 and not p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    trained = footprint(model, x, policy=policy, autocast=torch.bfloat16, fake=True).saved_bytes
    assert kept["fake"] <= trained < kept["fake"] + weights


@pytest.mark.usefixtures("rows")
def test_a_weight_computed_without_a_gradient_is_kept_as_its_cast():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.raw * 2)

    model, x = Computed(), tokens()
    kept = [
        footprint(model, x, policy=policy, autocast=torch.bfloat16).saved_bytes
        for policy in ("plain", Policy(min_bytes=0))
    ]
    assert kept == [WIDTH * WIDTH * 2] * 2


@pytest.mark.usefixtures("rows")
def test_trained_magnitudes_keep_one_tensor_more():
    """DoRA kept the output of every Linear: nine tensors of the width in each block."""
    grown = {}
    for adapter in (Adapted, Weighted):
        saved = [
            footprint(network(2, adapter=adapter), tokens(batch=b), policy=RECOMPUTE).saved_bytes
            for b in (8, 16)
        ]
        grown[adapter] = saved[1] - saved[0]
    # The output of fc2, whose input a matmul rebuilds.
    assert grown[Weighted] - grown[Adapted] <= 2 * 8 * TOKENS * (WIDTH + 4)
    gradients = []
    for policy in (None, LOSSLESS):
        model, x = network(adapter=Weighted).double(), tokens().detach().double()
        if policy is not None:
            wrap(model, policy)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
