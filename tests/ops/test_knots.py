"""Derivatives where two pieces of a function meet, at ties and at values that are not finite: PyTorch's own choice."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch

from mesa_train import Policy, compress, footprint

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOSSLESS = Policy(bits=32, min_bytes=0)


def steps(dtype):
    """Every knot of the functions below, its neighbours in `dtype`, and values far from any."""
    knots = torch.tensor([0.0, -0.0, 0.1, -0.1, 1, -1, 2, -2, 3, -3, 6, 20], dtype=dtype)
    beside = [torch.nextafter(knots, torch.full_like(knots, end)) for end in (INF, -INF)]
    return torch.cat([knots, *beside, torch.tensor([0.5, -0.5, 100, -100], dtype=dtype)])


STEPS = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x * 1),
    "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x * 1, True),
    "leaky_relu": F.leaky_relu,
    "leaky_relu -0.2": lambda x: F.leaky_relu(x, -0.2),
    "leaky_relu 0": lambda x: F.leaky_relu(x, 0.0),
    "leaky_relu 1": lambda x: F.leaky_relu(x, 1.0),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda x: F.hardsigmoid(x * 1, True),
    "hardswish": F.hardswish,
    "hardswish in place": lambda x: F.hardswish(x * 1, True),
    "elu": F.elu,
    "elu 0.7": lambda x: F.elu(x, 0.7),
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp of floats": lambda x: x.clamp(-0.1, 0.1),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: torch.clamp(x, max=1.0),
    "clamp to one value": lambda x: x.clamp(1, 1),
    "clamp crossed": lambda x: x.clamp(2, -2),
    "clamp by infinity": lambda x: x.clamp(-INF, INF),
    "clamp by NaN": lambda x: x.clamp(NAN, 1),
    "clamp to NaN": lambda x: x.clamp(-1, NAN),
    "clamp by tensors": lambda x: x.clamp(torch.tensor(-1.0), torch.tensor(1.0)),
    "clamp_": lambda x: (x * 1).clamp_(-1, 1),
    "clip": lambda x: x.clip(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "hardtanh": F.hardtanh,
    "threshold": lambda x: F.threshold(x, 1, 0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "abs": torch.abs,
    "celu": F.celu,
}


def derivative(function, x, policy):
    leaf = x.clone().requires_grad_()
    moved = leaf * 1
    if policy is None:
        y = function(moved)
    else:
        with compress(policy):
            y = function(moved)
    weights = torch.linspace(1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    return torch.autograd.grad(y, leaf, weights)[0]


def assert_plain(function, x):
    expected, found = derivative(function, x, None), derivative(function, x, LOSSLESS)
    # A norm's gradient is a difference of sums of four terms.
    bound = 16 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_knots(name, dtype):
    assert_plain(STEPS[name], steps(dtype))


@pytest.mark.parametrize("name", STEPS)
def test_values_that_are_not_finite(name):
    # Enough of them that both the vectorised loop and its remainder meet each.
    values = [INF, -INF, NAN, 1.0, -1.0]
    if name.startswith("relu6"):
        # PyTorch's two loops differ at a NaN: the vectorised one stops the gradient, the other one does not.
        values.remove(NAN)
    assert_plain(STEPS[name], torch.tensor(values).repeat(21))


@pytest.mark.parametrize("policy", ["mesa8", "mesa4"])
def test_a_bit_decides_exactly_however_few_bits_there_are(policy):
    for name in ("relu", "relu6", "leaky_relu", "hardsigmoid", "clamp"):
        x = steps(torch.float32).repeat(20)
        expected = derivative(STEPS[name], x, None)
        found = derivative(STEPS[name], x, Policy.of(policy))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def behind_a_norm(x):
    """The codes are the norm's, made before the activation was known."""
    mean, variance = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    # PyTorch 2.11 takes no eps of 0.
    return F.hardswish(F.batch_norm(x, mean, variance, eps=1e-30))


HARDSWISH = {
    "hardswish": F.hardswish,
    "in place": lambda x: F.hardswish(x * 1, True),
    "behind a batch norm": behind_a_norm,
    "before a Linear": lambda x: F.linear(F.hardswish(x), torch.eye(x.shape[-1])),
}


@pytest.mark.parametrize("forward", ["exact", "fused"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", HARDSWISH)
def test_codes_do_not_cross_the_knots_of_hardswish(name, bits, forward):
    """The derivative jumps by a half at -3 and 3. Codes alone put elements near a knot on the other side."""
    seed_torch(0)
    knots = torch.tensor([-3.0, 3.0]).repeat_interleave(256)
    x = (knots + 0.2 * torch.randn(8, 512)).view(16, 256)
    x[0, :4] = torch.tensor([-3.0, 3.0, -6.0, 6.0])
    function = HARDSWISH[name]
    policy = Policy(bits=bits, min_bytes=0, group_size=256, forward=forward)
    found, expected = derivative(function, x, policy), derivative(function, x, None)
    # Between the knots the derivative is x / 3 + 1 / 2, and the largest weight is 2. Below 8 bits codes are
    # rounded stochastically, a whole step off at most.
    error = (x.max() - x.min()) / (2**bits - 1) * (1 if bits < 8 else 0.5)
    assert (found - expected).abs().max() < 2 / 3 * error * 1.02


def test_hardswish_keeps_one_bit_beside_its_codes():
    model = torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False), torch.nn.Hardswish())
    kept = footprint(model, torch.randn(32, 64), policy=Policy(min_bytes=0))
    codes = 32 * 256 + 32 * 2 * 4
    assert kept.by_operator["hardswish"] == codes + 32 * 256 // 8


TIES = [[1, 1, 0, 1], [NAN, 1, 2, NAN], [INF, INF, 1, 2], [-INF] * 4, [0, -0.0, 0, -1], [NAN] * 4]
REDUCED = {
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "amax, kept": lambda x: x.amax(-1, keepdim=True),
    "amax of all": torch.amax,
    "amax of two dims": lambda x: x.view(2, 3, 4).amax((0, 2)),
    "max along": lambda x: x.max(-1)[0],
    "max of all": torch.max,
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "minimum": lambda x: torch.minimum(x, x.flip(-1)),
    "glu": F.glu,
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "softmax": lambda x: x.softmax(-1),
    "softmax along columns": lambda x: x.softmax(0),
    "dropout 0": lambda x: F.dropout(x, 0.0),
    "dropout 1": lambda x: F.dropout(x, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REDUCED)
def test_ties_and_rows_that_are_not_finite(name, dtype):
    for rows in (TIES, TIES[:1] * 6, TIES[2:3] * 6):
        assert_plain(REDUCED[name], torch.tensor(rows, dtype=dtype))


@pytest.mark.parametrize("policy", ["lossless", "mesa8"])
@pytest.mark.parametrize("function", [torch.amax, torch.amin])
def test_a_tie_is_shared_equally(function, policy):
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0]]).repeat(3, 1).requires_grad_()
    with compress(Policy.of(policy)):
        y = function(x * 1, -1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-12, 0.0, 0.5, 5.0])
def test_vectors_of_length_zero_and_of_length_eps(dtype, eps):
    x = torch.tensor([[0, 0, 0], [3, 4, 0], [0.3, 0.4, 0], [-0.0, 0, 0]], dtype=dtype)
    # Divided by its length of about 0.5, a vector's gradient has more roundings.
    expected, found = [
        derivative(lambda t: F.normalize(t, dim=-1, eps=eps), x, p) for p in (None, LOSSLESS)
    ]
    bound = 0.02 if dtype is torch.bfloat16 else 16 * torch.finfo(dtype).eps
    # PyTorch 2.11 has NaN for a vector of length 0 without eps.
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm", "rms_norm"])
def test_constant_rows(name):
    x = torch.zeros(3, 4, dtype=torch.float64)
    norms = {
        "batch_norm": lambda t: F.batch_norm(t, None, None, training=True),
        "group_norm": lambda t: F.group_norm(t, 2),
        "layer_norm": lambda t: F.layer_norm(t, (4,)),
        "rms_norm": lambda t: F.rms_norm(t, (4,)),
    }
    expected, found = [derivative(norms[name], x, p) for p in (None, LOSSLESS)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recompute", ["none", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_without_targets_that_count(reduction, recompute):
    """The mean is NaN, and the gradient is 0, so that one such batch does not end a training."""
    target, weight = torch.full((6,), -100), torch.randn(5, 8)

    def loss(x):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction).sum() * INF

    x = torch.randn(6, 8)
    found = derivative(loss, x, Policy(min_bytes=0, recompute=recompute))
    assert torch.equal(found, derivative(loss, x, None))
    assert torch.equal(found, torch.zeros(6, 8))
