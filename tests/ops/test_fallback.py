"""Functions without a row: which saved tensors are coded, which stay exact, and what names them."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from stash_helpers import kept
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import mesa_train
from mesa_train import Policy, compress
from mesa_train.ops.coded import CODED
from mesa_train.ops.fallback import _is_weight
from mesa_train.utils.torch_functions import function_name

SHAPE = (96, 64)  # 24 KiB: above the size from which the stock preset codes


def gradients(function, *tensors, policy=None):
    """Gradients at activations, and the rows of the report."""
    seed_torch(0)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    arguments = [t * 1 if t.requires_grad else t for t in leaves]
    rows = {}
    if policy is None:
        output = function(*arguments)
    else:
        with compress(policy) as mode:
            output = function(*arguments)
        rows = {key[1:]: size for key, (_, size) in mode.recorder.report.rows.items()}
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(output, wanted, weights.to(output.dtype), allow_unused=True), rows


def error(function, *tensors, policy="mesa8"):
    plain, _ = gradients(function, *tensors)
    found, _ = gradients(function, *tensors, policy=policy)
    pairs = [(f, p) for f, p in zip(found, plain, strict=True) if p is not None]
    return max(((f - p).norm() / p.norm()).item() for f, p in pairs)


def grid(size):
    lines = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(lines, lines, indexing="xy"), -1)[None] * 0.9 + 0.01


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@torch.library.custom_op("mesa_train_test::mul", mutates_args=())
def mul(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


mul.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def pow(x):
    """A library's function in Python that modes see, called as one of torch's is."""
    if has_torch_function_unary(x) or torch.overrides._is_torch_function_mode_enabled():
        return handle_torch_function(pow, (x,), x)
    return x.sin() * x.cos()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def scripted(x: torch.Tensor):
        return x.sin() * x


LARGE = 300 * (torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5)
EXACT = {
    "sin": (torch.sin, LARGE),
    "cos": (torch.cos, LARGE),
    "a quotient": (lambda x: x / (1 + x.abs()), LARGE),
    "erf": (torch.erf, LARGE),
    "sqrt": (lambda x: x.abs().sqrt(), LARGE),
    "a root": (lambda x: x.abs() ** 0.5, LARGE),
    "a tensor as exponent": (lambda x: x.abs().clamp_min(1) ** (x * 0.001), LARGE),
    "atan2": (lambda x: torch.atan2(x, x.roll(1)), LARGE),
    "a custom autograd.Function": (Sine.apply, LARGE),
    "an operator of torch.library": (mul, LARGE),
    "a library's function": (pow, LARGE),
    "a ScriptFunction": (scripted, LARGE),
    "rfft": (lambda x: torch.fft.rfft(x).abs(), LARGE),
    "scatter": (lambda x: x.scatter_reduce(1, (x > 0).long(), x, "amax"), LARGE),
    "a constant factor": (lambda x: x * LARGE, LARGE),
    "a constant factor in place": (lambda x: x.mul_(LARGE), LARGE),
    "a constant third factor": (lambda x: torch.addcmul(x, x, LARGE), LARGE),
    "a constant matrix": (lambda x: torch.mv(LARGE, x[0]), LARGE),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_known_to_tolerate_codes_is_exact(name):
    function, x = EXACT[name]
    assert (
        error(function, x) <= 1e-6
    )  # log, + and * have rows or save nothing; sums in another order


def test_coordinates_are_exact_and_the_picture_they_sample_is_coded():
    seed_torch(0)
    picture = torch.randn(1, 8, 48, 48)

    def sample(x, g):
        return F.grid_sample(x, g, align_corners=False)

    (_, dgrid), rows = gradients(sample, picture, grid(48), policy="mesa8")
    (_, plain), _ = gradients(sample, picture, grid(48))
    assert 0 < (dgrid - plain).norm() / plain.norm() < 0.02
    # With the picture exact too the grid's gradient is PyTorch's: nothing of the grid is coded.
    whole = Policy(overrides={"fallback.grid_sample": {"enabled": False}})
    assert error(sample, picture, grid(48), policy=whole) == 0
    assert rows["grid_sample", "saved", "uncompressed: exact"] == 48 * 48 * 2 * 4


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_boxes_are_exact(name):
    ops = pytest.importorskip("torchvision.ops")
    seed_torch(0)
    corner = 20 * torch.rand(1000, 2)
    image = torch.randint(2, (1000, 1)).float()
    boxes = torch.cat([image, corner, corner + 2 + 8 * torch.rand(1000, 2)], -1)
    function = getattr(ops, name)
    assert error(lambda x, b: function(x, b, 2), torch.randn(2, 8, 32, 32), boxes) <= 1e-6


CODED_CALLS = {
    "addcmul": (torch.addcmul, SHAPE, SHAPE, SHAPE),
    "square": (torch.square, SHAPE),
    "pow": (lambda x: x**3, SHAPE),
    "bilinear": (F.bilinear, (128, 96), (128, 64), (2, 96, 64)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), SHAPE, SHAPE),
    "mul": (lambda a, b: a.mul_(b), SHAPE, SHAPE),
}


@pytest.mark.parametrize("name", CODED_CALLS)
def test_products_are_coded(name):
    function, *shapes = CODED_CALLS[name]
    seed_torch(0)
    tensors = [torch.randn(shape) for shape in shapes]
    _, rows = gradients(function, *tensors, policy="mesa8")
    assert any(key[0] == name and key[2].startswith("8 bits") for key in rows)
    # 0.6 % is what 8 bits of a Gaussian in groups of 128 are off.
    assert error(function, *tensors) < 0.01


SIZES = {
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 7),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 5),
    "pad": lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    "interpolate": lambda x: F.interpolate(x, size=(7, 7), mode="area"),
    "take_along_dim": lambda x: x.take_along_dim(torch.zeros(2, 1, 32, 32, dtype=torch.int64), 1),
    "masked_select": lambda x: x.masked_select(torch.eye(32, dtype=torch.bool)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_costs_nothing(name, layout):
    seed_torch(0)
    x = torch.randn(2, 8, 32, 32)

    def function(x):
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        elif layout == "expanded":
            x = x[:1].expand(2, -1, -1, -1)
        return SIZES[name](x)

    for policy in ("mesa8", "lossless"):
        assert error(function, x, policy=policy) == 0
        assert gradients(function, x, policy=policy)[1][name, "saved", "its size"] == 0


def test_a_pool_keeps_its_indices_alone():
    x = torch.randn(2, 8, 32, 32).requires_grad_() * 1
    assert kept(lambda x: F.adaptive_max_pool2d(x, 16), x)[0] == 2 * 8 * 16 * 16 * 8
    assert kept(lambda x: F.avg_pool2d(x, 2), x)[0] == 0


def test_a_mask_is_packed_once_and_never_grows():
    x, mask = torch.randn(64, 64, 64).requires_grad_() * 1, torch.rand(64, 64, 64) > 0.5
    size, _ = kept(lambda x: x.masked_fill(mask, 0).masked_fill(mask, 1), x)
    assert size == mask.numel() // 8
    # A mask of one row for all: 64 bytes, where one bit for each element would be 32 KiB.
    row = mask[0, 0].clone()
    wide = row.expand(64, 64, 64)
    size, output = kept(lambda x: torch.where(wide, x, x * 2), x)
    assert size == row.numel()
    output.sum().backward()


def test_a_mask_as_a_float_shares_its_bits():
    mask = torch.rand(SHAPE) > 0.5
    x, y = torch.randn(SHAPE), torch.randn(SHAPE)

    def function(x, y):
        return F.linear(x.masked_fill(mask, 0), y) + F.linear(mask.float(), y)

    policy = Policy(bits=32, min_bytes=0)
    assert error(function, x, y, policy=policy) < 1e-6
    _, rows = gradients(function, x, y, policy=policy)
    assert rows["linear", "input", "shared"] == 0


def test_an_override_names_a_function():
    on = Policy(overrides={"fallback.sin": {}})
    _, rows = gradients(torch.sin, LARGE, policy=on)
    assert ("sin", "sin", "8 bits in groups of 128, nearest") in rows
    assert error(torch.sin, LARGE, policy=on) > 0.1
    off = Policy(overrides={"fallback.pow": {"enabled": False}})
    assert error(lambda x: x**2, LARGE, policy=off) == 0
    assert error(lambda x: x.square() + x**2, LARGE, policy=off) > 0
    for name in ("fallback.sin_", "fallback.__rpow__", "fallback.mul"):
        Policy(overrides={name: {"bits": 8}}).rules([""])


def test_an_override_names_a_function_in_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Square(), Square()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    policy = Policy(overrides={"blocks.1:fallback.square": {"enabled": False}})
    model = mesa_train.wrap(Net(), policy)
    model(torch.randn(SHAPE).requires_grad_() * 1)
    how = {(r.module, r.operator): r.how for r in mesa_train.coverage(model).rows}
    assert how["blocks.0", "square"] == "8 bits in groups of 128, nearest"
    assert how["blocks.1", "square"] == "uncompressed: exact"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("fallback.sinn", r"matches no function .*close names: fallback\.sin"),
        ("fallback.grid_sampl", r"close names: fallback\.grid_sample"),
        ("fallback.no_such_thing_at_all", "matches no function of torch or of a loaded library"),
        ("sin", r"close names: fallback\.sin"),
        ("blocks.*:sin", "matches no operator"),
    ],
)
def test_a_mistyped_function_is_named(pattern, said):
    with pytest.raises(ValueError, match=said):
        Policy(overrides={pattern: {"bits": 8}}).rules(["", "blocks", "blocks.0"])


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.Tensor.__rpow__, "pow"),
        (torch.Tensor.mul_, "mul"),
        (F.max_pool2d, "max_pool2d"),
        (torch.ops.mesa_train_test.mul.default, "mul"),
        (torch.Tensor.T.__get__, "T"),
    ],
)
def test_names(func, name):
    assert function_name(func) == name


def test_every_function_of_the_table_is_torchs():
    assert len(CODED) > 80
    assert mul not in CODED
    assert torch.ops.mesa_train_test.mul not in CODED
    assert pow not in CODED


def test_an_operator_that_is_disabled_is_left_to_pytorch():
    weight = torch.randn(8, 64, requires_grad=True)
    policy = Policy(overrides={"linear": {"enabled": False}})
    assert error(lambda x: F.linear(x, weight), LARGE, policy=policy) == 0
    x = torch.randn(4, 24, 64, requires_grad=True)
    with compress(policy) as mode:
        F.linear(x * 1, weight)
    assert {key[3] for key in mode.recorder.report.rows} <= {"uncompressed: exact"}


def test_a_write_to_what_is_kept_whole_is_reported():
    x = torch.randn(SHAPE).requires_grad_() * 1
    with compress("mesa8"):
        y = x.sin()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_copy_of_a_weight_in_another_dtype_is_a_weight():
    """Autocast makes one, and so may a view of it be kept."""
    weight = nn.Parameter(torch.ones(2, 3))
    narrow = weight.bfloat16()
    assert [_is_weight(t) for t in (weight, weight.t(), narrow, narrow.t())] == [True] * 4
    assert not _is_weight((weight * 2).bfloat16())
    assert not _is_weight(weight * 2)


def test_the_decisions_are_what_was_measured(monkeypatch):
    """scripts/bench/fallback.py measured that every coded function is at most 2 % off, and that every size is all."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(root / "scripts/bench")
    from tables.fallback import decision

    rows = [json.loads(x) for x in (root / "docs/results/fallback.jsonl").read_text().splitlines()]
    coded = [row for row in rows if decision(row["function"]) == "coded"]
    sizes = [row for row in rows if decision(row["function"]) == "size"]
    assert len({row["function"] for row in coded}) > 30
    assert max(row["error"] for row in coded) <= 0.02
    assert len(sizes) > 30
    assert all(row["sizes_alone"] for row in sizes)
    # What the table of functions allows has been measured: by its name, or by that of the function it is an alias of.
    measured = {row["function"] for row in rows}
    assert {"sin", "grid_sample", "roi_align", "lstm", "conv_transpose2d"} <= measured
