"""Tensors that are not like others: from inference mode, nested ones, and those of the meta device. A wrapped model
computes with them as a plain one does, or raises what PyTorch raises."""

import pytest
import torch
import torch.nn.functional as F
from integration_models import distance, gradients
from torch import nn

import mesa_train
from mesa_train import Policy, footprint

LOSSLESS = Policy(bits=32, min_bytes=0)
EIGHT = Policy(min_bytes=0)
RECOMPUTE = Policy(min_bytes=0, recompute="linear")
POLICIES = pytest.mark.parametrize(
    "policy", [LOSSLESS, EIGHT, RECOMPUTE], ids=["lossless", "mesa8", "recompute"]
)
# Relative distance of gradients: the order of sums, or codes.
BOUND = {LOSSLESS: 1e-5, EIGHT: 0.05, RECOMPUTE: 0.05}

SAVED = "Inference tensors cannot be saved for backward"
# Uses in which PyTorch saves an inference tensor, and raises, and so does `lossless`; and those of them
# in which codes are kept instead, which are ordinary tensors.
RAISES = ("linear", "linear behind a view", "norm", "product", "matmul", "conv", "scaled")
CODED = tuple(use for use in RAISES if use != "product")


USES = {
    "add": lambda m, h, t: m.norm(h + t),
    "cat": lambda m, h, t: m.norm(torch.cat([h, t])),
    "view": lambda m, h, t: m.norm(h + t.view(4, 2, 32).flatten(0, 1)),
    "where": lambda m, h, t: torch.where(t > 0, h, h * 2),
    "clone": lambda m, h, t: m.norm(h * t.clone()),
    "linear": lambda m, h, t: h + m.linear(t),
    "linear behind a view": lambda m, h, t: h + m.linear(t.view(2, 4, 32)).flatten(0, 1),
    "norm": lambda m, h, t: h + m.norm(t),
    "product": lambda m, h, t: h * t,
    "matmul": lambda m, h, t: h @ t.t() @ h,
    "conv": lambda m, h, t: h + m.conv(t[None])[0],
    "gelu and linear": lambda m, h, t: h + m.linear(F.gelu(t)),
    "scaled": lambda m, h, t: h + m.linear(t) * m.scale,
}


class Student(nn.Module):
    """Uses a teacher's features `t` in one of several ways."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.use = USES[use]
        self.first, self.linear, self.norm = nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.conv, self.scale = nn.Conv1d(8, 8, 1), nn.Parameter(torch.rand(32))

    def forward(self, x, t):
        return self.use(self, F.gelu(self.first(x)), t).square().sum()


@POLICIES
@pytest.mark.parametrize("use", USES)
def test_a_teacher_under_inference_mode(use, policy):
    torch.manual_seed(1)
    x = torch.randn(8, 16)
    with torch.inference_mode():
        features = torch.randn(8, 32)
    plain, model = Student(use), mesa_train.wrap(Student(use), policy)
    if use in RAISES:
        with pytest.raises(RuntimeError, match=SAVED):
            plain(x, features).backward()
        plain = Student(use)
        plain(x, features.clone()).backward()
        if policy is LOSSLESS or use not in CODED:
            with pytest.raises(RuntimeError, match=SAVED):
                model(x, features)
            return
    else:
        plain(x, features).backward()
    model(x, features).backward()
    assert distance(gradients(model), gradients(plain)) <= BOUND[policy]


@POLICIES
def test_a_wrapped_model_under_inference_mode(policy):
    plain, model = Student("add"), mesa_train.wrap(Student("add"), policy)
    x, t = torch.randn(8, 16), torch.randn(8, 32)
    with torch.inference_mode():
        output = model(x, t)
        assert output.is_inference()
        assert torch.equal(output, plain(x, t))


def test_an_inference_tensor_has_no_lineage():
    """It can be written to without a trace, in the next inference mode."""
    with torch.inference_mode():
        x = torch.randn(8, 32)
    weight = torch.randn(4, 32, requires_grad=True)
    with mesa_train.compress(EIGHT):
        first = F.linear(x, weight)
        with torch.inference_mode():
            x.zero_()
        second = F.linear(x, weight)
    (gradient,) = torch.autograd.grad(second.sum(), weight, retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(first.sum(), weight)
    assert gradient.any()


def nested(layout):
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 32, generator=generator) for n in (5, 7, 3)]
    return torch.nested.nested_tensor(parts, layout=layout)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        batch = x.size(0)
        q, k, v = [
            part(x).reshape(batch, -1, 4, 8).transpose(1, 2) for part in (self.q, self.k, self.v)
        ]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, 32)
        return self.out(y)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        x = self.linear(x)
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


class Between(nn.Module):
    """Dense outside, nested inside."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.first, self.last = layout, nn.Linear(32, 32), nn.Linear(32, 8)
        self.inside = MLP()

    def forward(self, x):
        x = self.first(x)
        parts = torch.nested.as_nested_tensor([x[0, :5], x[1, :3]], layout=self.layout)
        return self.last(torch.nested.to_padded_tensor(self.inside(parts), 0.0))


NESTED = {
    "strided MLP": (MLP, torch.strided),
    "jagged MLP": (MLP, torch.jagged),
    "jagged attention": (Attention, torch.jagged),
    "strided scores": (Scores, torch.strided),
    "strided inside": (lambda: Between(torch.strided), None),
    "jagged inside": (lambda: Between(torch.jagged), None),
}


# PyTorch says of the strided layout that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@POLICIES
@pytest.mark.parametrize("case", NESTED)
def test_nested_tensors(case, policy):
    make, layout = NESTED[case]
    inputs = torch.randn(2, 7, 32) if layout is None else nested(layout)
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = make()
        if wrapped:
            mesa_train.wrap(model, policy)
        output = model(inputs)
        parts = output.unbind() if output.is_nested else [output]
        sum([p.square().sum() for p in parts]).backward()
        results.append(gradients(model))
    assert distance(results[1], results[0]) <= BOUND[policy]
    assert footprint(make(), inputs, policy=policy).saved_bytes > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_what_a_nested_tensor_leaves_uncompressed_is_reported(layout):
    """The rows had 0 bytes."""
    model, x = mesa_train.wrap(MLP()), nested(layout)
    model(x)
    tokens = 5 + 7 + 3
    # GELU's input, and the inputs of both Linears.
    size = sum(row.bytes for row in mesa_train.coverage(model).rows)
    assert size >= tokens * (32 + 64 + 64) * 4


def test_nested_tensors_have_no_fakes():
    with pytest.raises(ValueError, match="PyTorch has no fake nested tensors"):
        footprint(MLP(), nested(torch.jagged), fake=True)


def test_the_footprint_of_eager_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            # On the CPU it has no derivative.
            q = x.view(2, -1, 2, 16).transpose(1, 2)
            return self.linear(flex.flex_attention(q, q, q).transpose(1, 2).flatten(2))

    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        size = footprint(Flex(), torch.randn(2, 128, 32), policy="plain").saved_bytes
    assert size == 2 * 128 * 32 * 4  # the Linear's input


class FlexWithMask(nn.Module):
    """A packed batch: a token attends to tokens of its own image."""

    def __init__(self, flex, tokens=128):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.norm, self.linear = nn.Linear(32, 96), nn.LayerNorm(32), nn.Linear(32, 32)
        images = torch.arange(tokens) // 50

        def same_image(batch, head, query, key):
            return images[query] == images[key]

        self.attend = flex.flex_attention
        self.mask = flex.create_block_mask(same_image, None, None, tokens, tokens, device="cpu")

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, block_mask=self.mask)
        return self.linear(out.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_a_block_mask():
    """On a CPU it has a forward alone, and PyTorch's error reaches the user."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    model, x = FlexWithMask(flex), torch.randn(2, 128, 32)
    with torch.no_grad():
        expected = model(x)
    mesa_train.wrap(model, EIGHT)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(x)
    mesa_train.unwrap(model)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(x)


class FlashAttention(torch.autograd.Function):
    """As in packages with their own kernels: q, k, v, the output and the logarithms of the sums are saved."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        scores = q @ k.transpose(-1, -2) * scale
        logarithms = scores.logsumexp(-1)
        out = scores.softmax(-1) @ v
        ctx.save_for_backward(q, k, v, out, logarithms)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, logarithms = ctx.saved_tensors
        weights = (q @ k.transpose(-1, -2) * ctx.scale - logarithms[..., None]).exp()
        dweights = grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
        dscores = weights * dweights * ctx.scale
        return dscores @ k, dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad, None


class WithExternalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.norm, self.linear = nn.Linear(32, 96), nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = FlashAttention.apply(q, k, v, 0.25)
        return x + self.linear(out.transpose(1, 2).flatten(2))


@POLICIES
def test_the_attention_of_another_package_is_left_alone_and_reported(policy):
    x, results = torch.randn(2, 48, 32), []
    for wrapped in (False, True):
        model = WithExternalAttention()
        if wrapped:
            mesa_train.wrap(model, policy)
        out = model(x)
        out.square().sum().backward()
        results.append((out, gradients(model)))
    assert torch.equal(results[1][0], results[0][0])
    assert distance(results[1][1], results[0][1]) <= BOUND[policy]
    # q, k and v are parts of one tensor.
    size = (3 + 1) * 2 * 48 * 32 * 4 + 2 * 2 * 48 * 4
    for fake in (False, True):
        counted = footprint(WithExternalAttention(), x, policy=policy, fake=fake)
        assert counted.by_operator["FlashAttention"] == size


META = {
    "LayerNorm": lambda: nn.LayerNorm(64),
    "RMSNorm": lambda: nn.RMSNorm(64),
    "GroupNorm": lambda: nn.GroupNorm(4, 16),
    "BatchNorm1d": lambda: nn.BatchNorm1d(16),
    "Linear": lambda: nn.Linear(64, 64),
    "Conv1d": lambda: nn.Conv1d(16, 16, 3),
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "Softmax": lambda: nn.Softmax(-1),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(64, 2, batch_first=True),
}


@POLICIES
@pytest.mark.parametrize("kind", META)
def test_the_meta_device(kind, policy):
    with torch.device("meta"):
        model = mesa_train.wrap(META[kind](), policy)
    x = torch.randn(4, 16, 64, device="meta", requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape
