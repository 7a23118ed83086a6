"""What a caller can get wrong, and the shapes and dtypes that nobody thinks of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import mesa_train
from mesa_train import Policy, compress

LOSSLESS = Policy(bits=32, min_bytes=0)
EIGHT = Policy(min_bytes=0)


@pytest.mark.parametrize("function", [mesa_train.wrap, mesa_train.unwrap])
@pytest.mark.parametrize("given", [None, "vit", F.gelu, nn.Linear, {"a": 1}])
def test_not_a_module(function, given):
    with pytest.raises(TypeError, match=rf"takes an nn.Module, got {type(given).__name__}"):
        function(given)


@pytest.mark.parametrize("policy", ["mesa", "MESA8", ""])
def test_an_unknown_preset_lists_the_choices(policy):
    for call in (lambda: mesa_train.wrap(nn.Linear(2, 2), policy), lambda: compress(policy)):
        with pytest.raises(ValueError, match=r"unknown preset.*mesa8, mesa6"):
            call()


def test_a_policy_of_another_type():
    for call in (lambda: mesa_train.wrap(nn.Linear(2, 2), 8), lambda: compress({"bits": 8})):
        with pytest.raises(TypeError, match="policy must be a Policy"):
            call()


def test_a_model_without_parameters():
    model = mesa_train.wrap(nn.GELU(), EIGHT)
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(model(x), F.gelu(x))
    empty = mesa_train.wrap(nn.Sequential())
    assert torch.equal(empty(x), x)


def test_a_model_that_returns_no_tensor_that_requires_grad():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return {"logits": self.linear(x).detach(), "count": x.argmax(-1), "nothing": None}

    model = mesa_train.wrap(Detached(), EIGHT)
    output = model(torch.randn(3, 4))
    assert not output["logits"].requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        output["logits"].sum().backward()
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert not mesa_train.wrap(frozen, EIGHT)(torch.randn(3, 4)).requires_grad


def assert_as_plain(function, *leaves):
    """Output and gradients as plain PyTorch's, or PyTorch's own error."""
    leaves = [t.clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in leaves]
    trained = [t for t in leaves if t.requires_grad]

    def run():
        output = function(*leaves)
        if not output.requires_grad:
            return output, []
        weight = torch.linspace(1, 2, max(output.numel(), 1), dtype=torch.float64)[: output.numel()]
        total = (output * weight.view(output.shape).to(output.dtype)).sum()
        if output.is_complex():
            total = total.abs()
        return output, torch.autograd.grad(total, trained, allow_unused=True)

    def attempt():
        try:
            return run(), None
        except (RuntimeError, ValueError, TypeError, IndexError) as refusal:
            return (None, None), refusal

    (expected, gradients), refusal = attempt()
    if refusal is not None:
        for policy in (LOSSLESS, EIGHT):
            with compress(policy):
                _, ours = attempt()
            assert type(ours) is type(refusal)
            assert str(ours).splitlines()[0] == str(refusal).splitlines()[0]
        return
    for policy in (LOSSLESS, EIGHT):
        with compress(policy):
            found, ours = run()
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert torch.equal(found.detach().nan_to_num(), expected.detach().nan_to_num())
        for o, g in zip(ours, gradients, strict=True):
            assert (o is None) == (g is None)
            if g is not None:
                assert o.shape == g.shape
                assert o.dtype == g.dtype
                # Where the gradient is zero the rounding of what cancels is left, relative to values of about one.
                rounding = 1e-10 if policy is LOSSLESS else 0.05
                assert (o - g).abs().sum() <= rounding * (g.abs().sum() + 1)


# The cases are made on import: of their own numbers, whichever files were imported before.
NUMBERS = torch.Generator().manual_seed(0)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=NUMBERS)


def attention_of_nothing(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


SHAPES = {
    "linear, empty batch": (F.linear, double(0, 8), double(4, 8), double(4)),
    "linear, empty tokens": (F.linear, double(3, 0, 8), double(4, 8), double(4)),
    "linear, no input features": (F.linear, double(3, 0), double(4, 0), double(4)),
    "linear, no output features": (F.linear, double(3, 8), double(0, 8), double(0)),
    "linear, batch of one": (F.linear, double(1, 8), double(4, 8), double(4)),
    "linear, one feature": (F.linear, double(5, 1), double(1, 1), double(1)),
    "linear, odd widths": (F.linear, double(3, 131), double(7, 131), double(7)),
    "linear, one more than a group": (F.linear, double(3, 129), double(2, 129)),
    "matmul, empty batch": (torch.matmul, double(0, 3, 4), double(0, 4, 5)),
    "matmul, nothing to sum": (torch.matmul, double(2, 3, 0), double(2, 0, 5)),
    "matmul, empty times a matrix": (torch.matmul, double(0, 3, 4), double(4, 5)),
    "matmul, nothing to sum by a matrix": (torch.matmul, double(2, 3, 0), double(0, 5)),
    "matmul, no columns": (torch.matmul, double(2, 3, 4), double(4, 0)),
    "bmm, empty": (torch.bmm, double(0, 3, 4), double(0, 4, 5)),
    "addmm, empty": (torch.addmm, double(5), double(0, 4), double(4, 5)),
    "einsum, empty": (lambda a, b: torch.einsum("ij,jk->ik", a, b), double(0, 4), double(4, 5)),
    "softmax, empty": (lambda x: x.softmax(-1), double(0, 5)),
    "softmax, of nothing": (lambda x: x.softmax(-1), double(3, 0)),
    "softmax, of a scalar": (lambda x: x.softmax(0), double()),
    "layer_norm, empty": (lambda x, w: F.layer_norm(x, (5,), w), double(0, 5), double(5)),
    "layer_norm, one feature": (lambda x, w: F.layer_norm(x, (1,), w), double(4, 1), double(1)),
    "rms_norm, empty": (lambda x, w: F.rms_norm(x, (5,), w), double(0, 5), double(5)),
    "group_norm, empty": (lambda x: F.group_norm(x, 2), double(0, 4, 3)),
    "group_norm, that does not divide": (lambda x: F.group_norm(x, 3), double(2, 4, 3)),
    "batch_norm, empty": (lambda x: F.batch_norm(x, None, None, training=True), double(0, 4, 3)),
    "batch_norm, one value a channel": (
        lambda x: F.batch_norm(x, None, None, training=True),
        double(1, 4),
    ),
    "batch_norm, eval without statistics": (lambda x: F.batch_norm(x, None, None), double(3, 4)),
    "normalize, empty": (lambda x: F.normalize(x, dim=-1), double(0, 4)),
    "normalize, zeros": (lambda x: F.normalize(x * 0, dim=-1), double(3, 4)),
    "gelu, empty": (F.gelu, double(0, 3)),
    "gelu, scalar": (F.gelu, double()),
    "gelu, of something else": (lambda x: F.gelu(x, approximate="erf"), double(3)),
    "relu, empty": (F.relu, double(0, 3)),
    "relu, scalar": (F.relu, double()),
    "sigmoid, empty": (torch.sigmoid, double(0)),
    "glu, odd": (F.glu, double(3, 5)),
    "glu, empty": (F.glu, double(0, 4)),
    "conv, empty batch": (F.conv2d, double(0, 3, 5, 5), double(2, 3, 3, 3)),
    "conv, too small": (F.conv2d, double(1, 3, 2, 2), double(2, 3, 3, 3)),
    "conv, one pixel": (F.conv2d, double(2, 3, 1, 1), double(2, 3, 1, 1)),
    "attention, empty batch": (
        attention_of_nothing,
        double(0, 2, 3, 4),
        double(0, 2, 3, 4),
        double(0, 2, 3, 4),
    ),
    "attention, no queries": (
        attention_of_nothing,
        double(1, 2, 0, 4),
        double(1, 2, 3, 4),
        double(1, 2, 3, 4),
    ),
    "attention, one token": (
        attention_of_nothing,
        double(1, 2, 1, 4),
        double(1, 2, 1, 4),
        double(1, 2, 1, 4),
    ),
    "attention, odd head": (
        attention_of_nothing,
        double(2, 3, 5, 7),
        double(2, 3, 5, 7),
        double(2, 3, 5, 7),
    ),
    "dropout, empty": (lambda x: F.dropout(x, 0.5), double(0, 3)),
    "dropout, p out of range": (lambda x: F.dropout(x, 1.5), double(2, 3)),
    "mul, empty": (torch.mul, double(0, 3), double(3)),
    "mul, shapes that do not broadcast": (torch.mul, double(2, 3), double(4)),
    "matmul, shapes that do not fit": (torch.matmul, double(2, 3), double(4, 5)),
    "linear, shapes that do not fit": (F.linear, double(2, 3), double(4, 5)),
    "linear, dtypes that do not fit": (F.linear, double(2, 3), torch.randn(4, 3)),
    "linear, integers": (
        F.linear,
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(4, 3, dtype=torch.long),
    ),
    "matmul, integers": (
        torch.matmul,
        torch.ones(2, 3, dtype=torch.int32),
        torch.ones(3, 3, dtype=torch.int32),
    ),
    "relu, integers": (F.relu, torch.arange(-3, 3)),
    "linear, complex": (
        F.linear,
        torch.randn(2, 3, dtype=torch.complex128),
        torch.randn(4, 3, dtype=torch.complex128),
    ),
    "matmul, complex": (
        torch.matmul,
        torch.randn(2, 3, dtype=torch.complex128),
        torch.randn(3, 2, dtype=torch.complex128),
    ),
    "mul, complex": (
        torch.mul,
        torch.randn(2, 3, dtype=torch.complex128),
        torch.randn(3, dtype=torch.complex128),
    ),
    "tanh, complex": (torch.tanh, torch.randn(2, 3, dtype=torch.complex128)),
    "exp, complex": (torch.exp, torch.randn(2, 3, dtype=torch.complex128)),
    "fft": (lambda x: torch.fft.rfft2(x).abs(), double(2, 4, 6)),
    "a mask": (lambda x: x.masked_fill(x > 0, 0.0), double(20, 30)),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2], [1, 1]]), w), double(4, 6)),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 0, 2])), double(3, 5)),
}


@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors", "ignore:Casting complex values to real"
)
@pytest.mark.parametrize("case", SHAPES)
def test_odd_shapes_and_dtypes_do_as_pytorch_does(case):
    assert_as_plain(*SHAPES[case])


BY_NAME = {
    "matmul": lambda x, w: torch.matmul(input=x, other=w),
    "softmax": lambda x, w: torch.softmax(input=x, dim=-1),
    "mul": lambda x, w: torch.mul(input=x, other=x),
    "relu": lambda x, w: torch.relu(input=x),
    "gelu": lambda x, w: F.gelu(input=x),
    "pad": lambda x, w: F.pad(input=x, pad=(1, 1), mode="constant", value=1.0),
    "pad reflect": lambda x, w: F.pad(x, (1, 1), mode="reflect"),
    "flatten": lambda x, w: torch.flatten(input=x, start_dim=1),
    "transpose": lambda x, w: torch.transpose(input=x, dim0=0, dim1=1),
    "split": lambda x, w: torch.split(tensor=x, split_size_or_sections=2, dim=-1)[1],
    "addmm": lambda x, w: torch.addmm(input=x.new_zeros(5), mat1=x[0], mat2=w),
    "bmm": lambda x, w: torch.bmm(input=x, mat2=x.mT),
    "layer_norm": lambda x, w: F.layer_norm(input=x, normalized_shape=[4]),
    "attention": lambda x, w: F.scaled_dot_product_attention(query=x, key=x, value=x),
    "dropout": lambda x, w: F.dropout(input=x, p=0.1, training=True, inplace=False),
    "torch.dropout": lambda x, w: torch.dropout(input=x, p=0.5, train=True),
}


@pytest.mark.parametrize("function", BY_NAME.values(), ids=BY_NAME)
def test_arguments_by_every_name(function):
    x, w = double(2, 3, 4), double(4, 5)

    def seeded(x, w):
        torch.manual_seed(0)
        return function(x, w)

    assert_as_plain(seeded, x, w)


def test_a_model_without_modules():
    x = torch.randn(2, 3, 4)
    assert torch.equal(mesa_train.wrap(nn.Sequential())(x), x)


def test_out_arguments():
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    with compress(EIGHT):
        for function in (torch.mul, torch.matmul, torch.mm):
            out = torch.empty(3, 3)
            assert function(a, b, out=out) is out
            assert torch.equal(out, function(a, b))


def test_sparse_and_nested_tensors_are_left_alone():
    sparse, dense = torch.eye(200).to_sparse(), torch.randn(200, 200).requires_grad_()
    with compress(EIGHT):
        output = torch.mm(sparse, dense.mul(1.0))
        output = output + torch.sparse.mm(sparse, dense.mul(2.0))
    output.sum().backward()
    assert torch.equal(dense.grad, torch.full((200, 200), 3.0))


def test_non_finite_values_reach_the_gradients():
    linear = nn.Linear(32, 4)
    for value in (float("nan"), float("inf")):
        x = torch.randn(3, 32)
        x[1, 2] = value
        with compress(EIGHT):
            output = linear(x.requires_grad_().mul(1.0))
        (gradient,) = torch.autograd.grad(output.sum(), linear.weight)
        assert not gradient.isfinite().all()


def test_inplace_on_a_leaf_is_pytorchs_error():
    x = torch.randn(3, 4, requires_grad=True)
    for function in (
        torch.relu_,
        lambda t: F.silu(t, inplace=True),
        lambda t: F.relu(t, inplace=True),
    ):
        with compress(EIGHT), pytest.raises(RuntimeError, match="leaf"):
            function(x)


def test_inplace_modules():
    torch.manual_seed(0)
    activations = [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.Mish, nn.ELU]
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)]
    for activation in activations:
        layers += [nn.Conv2d(8, 8, 1), activation(inplace=True)]
    layers += [nn.Conv2d(8, 4, 1), nn.LeakyReLU(0.1, inplace=True)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    mesa_train.wrap(model, LOSSLESS)(x).square().sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert (p.grad - e).norm() <= 1e-9 * e.norm() + 1e-12


def test_nothing_is_left_on_after_an_error():
    with pytest.raises(RuntimeError), compress():
        F.linear(torch.randn(2, 3, requires_grad=True), torch.randn(4, 5))
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize(
    "operator", ["linear", "layer_norm", "rms_norm", "group_norm", "softmax", "attention", "mul"]
)
def test_a_second_derivative_names_the_operator_and_the_remedy(operator):
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    w = torch.ones(4, 4, requires_grad=True)
    function = {
        "linear": lambda h: F.linear(h, w),
        "layer_norm": lambda h: F.layer_norm(h, (4,)),
        "rms_norm": lambda h: F.rms_norm(h, (4,)),
        "group_norm": lambda h: F.group_norm(h, 2),
        "softmax": lambda h: h.softmax(-1),
        "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
        "mul": lambda h: h * h,
    }[operator]
    with compress():
        output = function(x.mul(1.0))
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    said = rf"second derivative through '{operator}'.*overrides=\{{'{operator}': \{{'enabled': False\}}\}}, or unwrap"
    with pytest.raises(RuntimeError, match=said):
        first.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(first.sum(), x)
