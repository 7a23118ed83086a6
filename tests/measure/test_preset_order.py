"""No preset keeps more than a weaker one, and none more than plain training: counted on fakes."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mesa_train import Policy, footprint, unwrap, wrap
from mesa_train.measure.step import relative_error

ORDER = [
    ("lossless", "plain"),
    ("mesa8", "lossless"),
    ("mesa6", "mesa8"),
    ("mesa4", "mesa6"),
    ("mesa3", "mesa4"),
    ("mesa8-recompute", "mesa8"),
    ("mesa4-recompute", "mesa4"),
    ("mesa6-recompute", "mesa6"),
    ("mesa6-recompute", "mesa8-recompute"),
    ("mesa4-recompute", "mesa6-recompute"),
]
PRESETS = ["plain", *dict.fromkeys(name for name, _ in ORDER)]


class Standardized(nn.Conv2d):
    """A convolution with a standardized weight, as in NFNets: a norm over a parameter."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Adapted(nn.Module):
    """A frozen Linear plus an adapter of low rank."""

    def __init__(self, base, rank=8, dropout=0.1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x))) * 2.0


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.out = [nn.Linear(dim, dim) for _ in range(4)]

    def forward(self, x):
        q, k, v = [p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, dim=64, depth=2):
        super().__init__()
        self.embed = nn.Linear(48, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)),
                    nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        x = self.embed(x)
        for norm, attention, norm2, mlp in self.blocks:
            x = x + attention(norm(x))
            x = x + mlp(norm2(x))
        return x


def transformer():
    torch.manual_seed(0)
    return Transformer(), torch.randn(8, 64, 48)


def adapted(rank=8):
    model, x = transformer()
    model.requires_grad_(False)
    for norm, attention, *_ in model.blocks:
        for name in "qkv":
            setattr(attention, name, Adapted(getattr(attention, name), rank))
        norm.requires_grad_(True)
    return model, x


def residual_network():
    body = [
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3)),
        *(nn.GroupNorm(4, 16), nn.LeakyReLU(), nn.Conv2d(16, 16, 1), nn.Hardswish(inplace=True)),
        nn.Conv2d(16, 16, 3),
    ]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *body), torch.randn(8, 3, 32, 32)


def standardized_network():
    body = [Standardized(64, 64, 3, padding=1), nn.SiLU(inplace=True), Standardized(64, 64, 1)]
    return nn.Sequential(Standardized(3, 64, 3), *body, nn.SiLU()), torch.randn(2, 3, 8, 8)


def pointwise_mlp():
    """ConvNeXt's block with its MLP of convolutions."""
    body = [
        *(nn.Conv2d(32, 32, 7, padding=3, groups=32), nn.GroupNorm(1, 32)),
        *(nn.Conv2d(32, 128, 1), nn.GELU(), nn.Conv2d(128, 32, 1)),
    ]
    return nn.Sequential(nn.Conv2d(3, 32, 1), *body), torch.randn(8, 3, 32, 32)


class Split(nn.Module):
    """Convolutions of parts of one activation, which the activation's own node saves, as in Res2Net."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.parts = nn.ModuleList([nn.Conv2d(8, 8, 3) for _ in range(4)])

    def forward(self, x):
        parts = self.stem(x).chunk(4, 1)
        return torch.cat([part(y) for part, y in zip(self.parts, parts, strict=True)], 1)


def split_network():
    return Split(), torch.randn(8, 3, 32, 32)


class TwoNorms(nn.Module):
    """Two norms of one input, and a norm of an activation, as in DPN and RepGhost."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.right = nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.token = nn.LayerNorm(16)

    def forward(self, x):
        x = self.stem(x)
        x = self.left(x) + self.right(x)
        return self.token(x.flatten(2).mT[:, 0])


def two_norms():
    return TwoNorms(), torch.randn(8, 3, 32, 32)


class Positions(nn.Module):
    """Attention with a mask for every image that needs a gradient, as decomposed relative positions make
    it; with `shared`, one mask for all images."""

    def __init__(self, shared):
        super().__init__()
        self.qkv, self.bias = nn.Linear(64, 192), nn.Linear(16, 49)
        self.shared = shared

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 4, 16).permute(2, 0, 3, 1, 4)
        # A cosine has no stash.
        mask = self.bias(q[:1] if self.shared else q).cos()
        return F.scaled_dot_product_attention(q, k, v, mask)


def positions():
    return Positions(shared=False), torch.randn(8, 49, 64)


def shared_positions():
    return Positions(shared=True), torch.randn(8, 49, 64)


class Table(nn.Module):
    """Attention with a mask from a table of relative positions, which autocast casts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.table = nn.Linear(64, 192), nn.Parameter(torch.randn(4, 49))
        self.register_buffer("index", torch.randint(0, 49, (49, 49)))

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, self.table[:, self.index][None])


def table_positions():
    return Table(), torch.randn(1, 49, 64)


MODELS = [
    *(transformer, adapted, residual_network, standardized_network, pointwise_mlp),
    *(split_network, two_norms, positions, shared_positions, table_positions),
]


def saved(model, x, policy, autocast=None):
    return footprint(model, x, policy=policy, fake=True, autocast=autocast).saved_bytes


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_no_preset_keeps_more_than_a_weaker_one(build, autocast):
    model, x = build()
    saved_bytes = {preset: saved(model, x, preset, autocast) for preset in PRESETS}
    for stronger, weaker in ORDER:
        assert saved_bytes[stronger] <= saved_bytes[weaker], (stronger, weaker, saved_bytes)


def test_a_cast_mask_is_no_parameter():
    """Under autocast, a mask from a table was taken for a parameter, and kept instead of codes."""
    model, x = table_positions()
    small = {
        n: dataclasses.replace(Policy.preset(n), min_bytes=0) for n in ("mesa4", "mesa4-recompute")
    }
    stored = {name: saved(model, x, policy, torch.bfloat16) for name, policy in small.items()}
    assert stored["mesa4-recompute"] <= stored["mesa4"]


# One of each kind of timm's models, at the smallest images that they accept.
TIMM = (
    "efficientnet_b0",
    "nf_regnet_b0",
    "coatnet_nano_rw_224",
    "hiera_tiny_224",
    "mobilenetv2_100",
)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", TIMM)
def test_no_preset_keeps_more_than_a_weaker_one_on_timms_models(name, autocast):
    size = {"img_size": 224 if "hiera" in name else 64} if "net_b0" not in name else {}
    size = {} if "mobilenet" in name else size
    model = timm.create_model(name, num_classes=8, **size).train()
    x = torch.randn(2, 3, *(size.get("img_size", 64),) * 2)
    order = [("lossless", "plain"), ("mesa8", "lossless"), ("mesa8-recompute", "mesa8")]
    stored = {
        p: saved(model, x, p, autocast) for p in ("plain", "lossless", "mesa8", "mesa8-recompute")
    }
    for stronger, weaker in order:
        assert stored[stronger] <= stored[weaker], (stronger, weaker, stored)


def test_an_adapter_costs_no_more_than_its_own_tensors():
    """mesa8-recompute with a frozen base kept up to 2.6 times what it keeps in full training."""
    model, x = transformer()
    full = saved(model, x, "mesa8-recompute")
    tuned, _ = adapted()
    tokens = 8 * 64
    # Per adapter: one bit an element for dropout, the codes of the product of low rank (small ones
    # stay float32). The first block's base gets no gradient, so its q, k and v are kept: 3C codes.
    values = 6 * tokens * (64 // 8 + 8 * 4) + 3 * tokens * (64 + 4)
    assert saved(tuned, x, "mesa8-recompute") <= full + values


def gradients(model, x, policy):
    model = wrap(copy.deepcopy(model), policy)
    torch.manual_seed(1)
    model(x).square().mean().backward()
    unwrap(model)
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "build",
    [
        *(adapted, pointwise_mlp, standardized_network, residual_network),
        *(split_network, two_norms, positions, shared_positions),
    ],
    ids=lambda b: b.__name__,
)
def test_gradients_through_the_rebuilt_sums_and_convolutions(build):
    model, x = build()
    model = model.double()
    x = x.double()
    exact = Policy(bits=32, recompute="linear", min_bytes=0)
    expected = gradients(model, x, Policy(enabled=False))
    for actual, expected_gradient in zip(gradients(model, x, exact), expected, strict=True):
        torch.testing.assert_close(actual, expected_gradient, rtol=1e-9, atol=1e-12)


def test_two_norms_of_a_rebuilt_activation_save_no_codes():
    """Each coded its x_hat: 480 KB, more than lossless keeps under autocast."""
    model, x = two_norms()
    rows = footprint(model, x, policy="mesa8", fake=True).stored.to_dict()["rows"]
    how = {r["module"]: r["how"] for r in rows if r["operand"] == "normalized"}
    assert how["left.0"] == how["right.0"] == "rebuilt"
    assert "8 bits" in how["stem.1"]
    found = []
    for policy in (Policy(enabled=False), dataclasses.replace(Policy.preset("mesa8"), min_bytes=0)):
        copied = wrap(copy.deepcopy(model), policy)
        output = copied(x)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output * weights).sum().backward()
        found.append([p.grad for p in copied.parameters()])
    assert relative_error(found[1], found[0]) < 0.012


@pytest.mark.parametrize("build", [positions, shared_positions], ids=lambda b: b.__name__)
def test_attention_weights_are_computed_again_where_the_mask_is_smaller(build):
    """Else their codes are kept: a float32 mask per image takes four times as much."""
    model, x = build()
    rows = footprint(model, x, policy="mesa8-recompute", fake=True).stored.to_dict()["rows"]
    assert ("softmax" in {r["operator"] for r in rows}) == (build is positions)


def test_a_part_of_an_activation_is_kept_once():
    """Lossless, the parts are views of what PyTorch's own node saves."""
    model, x = split_network()
    saved_bytes = footprint(model, x, policy="lossless", fake=True).by_operator
    assert saved_bytes["conv2d"] == x.numel() * x.element_size()


def test_a_sum_of_matmuls_is_rebuilt_and_nothing_else():
    """q = base(x) + up(down(x)): attention keeps no q. A residual sum gets no recipe."""
    tuned, x = adapted()
    rows = footprint(tuned, x, policy="mesa8-recompute", fake=True).stored.to_dict()["rows"]
    rows = [r for r in rows if r["operator"] == "attention" and r["module"].startswith("blocks.1")]
    assert {r["how"] for r in rows if r["operand"] in "qkv"} == {"rebuilt"}


def test_lossless_under_autocast_keeps_the_cast_operand():
    """PyTorch saves the bfloat16 copy that the matmul read; the float32 tensor is twice as large."""
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(64, 64)
    assert saved(model, x, "lossless", torch.bfloat16) == x.numel() * 2
    small = dataclasses.replace(Policy.preset("mesa8"), min_bytes=1 << 20)
    assert saved(model, x, small, torch.bfloat16) == x.numel() * 2


def test_two_matmuls_share_the_cast_operand_until_it_is_written_to():
    class Twice(nn.Module):
        def __init__(self, writes):
            super().__init__()
            self.left, self.right = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.writes = writes

        def forward(self, x):
            x = x + 0.0
            left = self.left(x)
            if self.writes:
                x.add_(1.0)
            return left + self.right(x)

    x = torch.randn(4, 8)
    for writes, copies in ((False, 1), (True, 2)):
        model = Twice(writes)
        assert saved(model, x, "lossless", torch.bfloat16) == copies * x.numel() * 2
        with torch.autocast("cpu", torch.bfloat16):
            expected = gradients(model, x, Policy(enabled=False))
            result = gradients(model, x, "lossless")
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)


class Modulated(nn.Module):
    """A frozen block of a diffusion transformer: its Linears read tensors that have no stash."""

    def __init__(self, tuned):
        super().__init__()
        self.embed, self.attention = nn.Linear(48, 64), Attention(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.attention.requires_grad_(False)
        self.mlp.requires_grad_(False)
        if tuned:
            self.attention.q = Adapted(self.attention.q, dropout=0.0)

    def forward(self, x):
        # A cosine has no stash, like a norm times one plus a trained scale.
        x = self.embed(x).cos()
        return self.mlp((x + self.attention(x)).cos())


@pytest.mark.parametrize("fake", [True, False], ids=["python", "native"])
@pytest.mark.parametrize("tuned", [True, False], ids=["adapted", "frozen"])
def test_a_frozen_linear_is_rebuilt_from_its_inputs_codes(tuned, fake):
    """q, k, v and the hidden layer were kept: 7C codes instead of 2C."""
    torch.manual_seed(0)
    model, x = Modulated(tuned), torch.randn(8, 64, 48)
    policy = dataclasses.replace(Policy.preset("mesa8-recompute"), min_bytes=0)
    found = footprint(model, x, policy=policy, fake=fake).by_operator
    tokens, codes_of = 8 * 64, 64 + 4
    if not tuned:
        # Two inputs, attention's output and its logsumexp.
        attention = tokens * (3 * codes_of - codes_of + 4 * 4)
        assert found["scaled_dot_product_attention"] <= attention
        assert found["gelu"] == tokens * codes_of
    rows = footprint(model, x, policy=policy, fake=True).stored.to_dict()["rows"]
    how = {r["operand"]: r["how"] for r in rows if r["operator"] == "attention"}
    assert {how[name] for name in "qkv"} == {"rebuilt"}
    gradients_of = {}
    for name, chosen in (("plain", Policy(enabled=False)), ("exact", EXACT)):
        gradients_of[name] = gradients(model.double(), x.double(), chosen)
    for actual, expected in zip(gradients_of["exact"], gradients_of["plain"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


EXACT = Policy(bits=32, recompute="linear", min_bytes=0)
