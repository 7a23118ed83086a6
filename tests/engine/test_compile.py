"""torch.compile traces a wrapped model whole, and the compiled model keeps and computes what the eager one does."""

import pytest
import torch
import torch.nn.functional as F
from compile_models import kept
from torch import nn

import mesa_train
from mesa_train import Policy, compress

EIGHT = Policy(min_bytes=0)

pytestmark = [
    # Dynamo reads deprecated attributes of torch while it traces.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
    ),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """What a ViT block does, with what is particular to some: layer scale, a gate, a mask of one bit."""

    def __init__(self, width=48, heads=3):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.fc1, self.fc2 = (
            nn.Linear(width, 64),
            nn.Linear(width, 64),
            nn.Linear(64, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(b, n, 3, self.heads, c // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(out) * self.scale
        h = self.norm2(x)
        return x + F.relu(self.fc2(F.silu(self.gate(h)) * self.fc1(h)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 4, 4)
        self.blocks = nn.Sequential(Block())
        self.head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 5))

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(function, model, x):
    model.zero_grad()
    output = function(x)
    output.square().sum().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters()]


def distance(found, expected):
    difference = sum((f - e).square().sum() for f, e in zip(found, expected, strict=True))
    return (difference / sum(e.square().sum() for e in expected)).sqrt().item()


@pytest.mark.parametrize(
    "policy",
    [
        EIGHT,
        *[
            pytest.param(policy, marks=pytest.mark.slow)
            for policy in (
                Policy(bits=4, min_bytes=0),
                Policy(min_bytes=0, recompute="linear"),
                Policy(bits=32),
            )
        ],
    ],
)
def test_the_whole_graph_gives_the_eager_gradients(model, policy):
    mesa_train.wrap(model, policy)
    expected_output, expected = gradients(model, model, images())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output, found = gradients(compiled, model, images())
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
    # Decompositions move x_hat by a rounding, and a code by a step where it lies between two.
    assert distance(found, expected) < (
        1e-5 if policy.bits == 32 else 1e-2 if policy.bits == 8 else 5e-2
    )


@pytest.mark.slow
def test_a_compiled_model_keeps_codes(model):
    plain = kept(torch.compile(model, backend="aot_eager", fullgraph=True), images())
    torch._dynamo.reset()
    mesa_train.wrap(model, EIGHT)
    assert kept(torch.compile(model, backend="aot_eager", fullgraph=True), images()) < plain / 2


class ScaledMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))
        self.scale = nn.Parameter(torch.full((48,), 0.1))

    def forward(self, x):
        return x + self.mlp(x) * self.scale


@pytest.mark.slow
def test_a_compiled_layer_scale_keeps_no_copy_of_the_weight_either():
    model = mesa_train.wrap(nn.Sequential(ScaledMLP(), ScaledMLP()), EIGHT)
    x = torch.randn(4, 50, 48)
    with torch.autocast("cpu", torch.bfloat16):
        eager = kept(model, x)
        assert kept(torch.compile(model, backend="aot_eager", fullgraph=True), x) <= eager


@pytest.mark.slow
def test_inductor(model):
    mesa_train.wrap(model, EIGHT)
    expected_output, expected = gradients(model, model, images())
    output, found = gradients(torch.compile(model, fullgraph=True), model, images())
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-4)
    assert distance(found, expected) < 1e-2


@pytest.mark.slow
def test_the_mode_with_cuda_graphs_computes_the_same_on_a_cpu(model):
    """`mode="reduce-overhead"` compiles the same code, and adds CUDA graphs on a GPU."""
    mesa_train.wrap(model, EIGHT)
    default_output, default = gradients(torch.compile(model, fullgraph=True), model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        output, found = gradients(compiled, model, images())
        assert torch.equal(output, default_output)
        assert all(torch.equal(f, d) for f, d in zip(found, default, strict=True))


@pytest.mark.parametrize("by", ["wrap", "compress"])
def test_a_compiled_graph_saves_codes(by):
    """With torch.compile, PyTorch 2.11 reports an export, in which models are plain."""
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)

    def inside(x):
        with compress(EIGHT):
            return layer(x)

    function = mesa_train.wrap(layer, EIGHT) if by == "wrap" else inside
    out = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    dtypes = {t.dtype for t in out.grad_fn.saved_tensors}
    assert torch.uint8 in dtypes
    assert torch.float32 not in dtypes


def test_compress_inside_and_outside():
    torch.manual_seed(0)
    x, w = torch.randn(8, 32).requires_grad_(), torch.randn(4, 32, requires_grad=True)

    def inside(x, w):
        with compress(EIGHT):
            return F.linear(F.gelu(x * 1.0), w)

    def expected():
        return torch.autograd.grad(inside(x, w).square().sum(), (x, w))

    found = torch.autograd.grad(
        torch.compile(inside, backend="aot_eager", fullgraph=True)(x, w).square().sum(), (x, w)
    )
    assert distance(found, expected()) < 5e-3

    def function(x, w):
        return F.linear(F.gelu(x * 1.0), w)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with compress(EIGHT):
        output = compiled(x, w)
    assert distance(torch.autograd.grad(output.square().sum(), (x, w)), expected()) < 5e-3


WRITES = {
    "add_": lambda h: h.add_(3.0),
    "+=": lambda h: h.__iadd__(3.0),
    "mul_": lambda h: h.mul_(2.0),
    "copy_": lambda h: h.copy_(torch.ones_like(h)),
    "relu_": lambda h: h.sub_(0.3).relu_(),
    "F.relu inplace": lambda h: F.relu(h.sub_(0.3), inplace=True),
    "F.silu inplace": lambda h: F.silu(h, inplace=True),
    "setitem": lambda h: h.__setitem__((slice(None), 0), 5.0),
    "a view of it": lambda h: h.view(-1)[3:20].mul_(4.0),
    "no_grad": lambda h: h.detach().add_(3.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_a_stale_lineage_is_not_used_while_tracing_either(write):
    torch.manual_seed(0)
    x, w = torch.randn(8, 32).requires_grad_(), torch.randn(4, 32, requires_grad=True)

    def function(x, w):
        h = F.gelu(x * 1.0)
        WRITES[write](h)
        return F.linear(h, w)

    expected = torch.autograd.grad(function(x, w).square().sum(), (x, w))
    with compress(Policy(bits=32, min_bytes=0)):
        output = torch.compile(function, backend="aot_eager", fullgraph=True)(x, w)
    assert distance(torch.autograd.grad(output.square().sum(), (x, w)), expected) < 1e-5


def test_unflatten_compiles_and_shares_its_stash_in_eager():
    """A method that Dynamo does not find in the table; eager calls find it and keep one stash."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 32), nn.Linear(8, 4)

        def forward(self, x):
            return self.two(F.gelu(self.one(x)).unflatten(-1, (4, 8)))

    model, x = mesa_train.wrap(Heads(), EIGHT), torch.randn(6, 16)
    expected = model(x)
    rows = mesa_train.coverage(model).rows
    assert [r.how for r in rows if r.module == "two"] == ["rebuilt"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
