"""A stash stands for one tensor in one state: writes, views and other users of it."""

import pytest
import torch
import torch.nn.functional as F
from stash_helpers import COLS, LOSSLESS, ROWS, activation, assert_equal, both, codes, kept
from torch import nn

from mesa_train import Policy, compress
from mesa_train.stash.lineage import Lineage


def overwritten(write):
    """gelu's output is rebuilt from gelu's input; after a write that would be another tensor's gradient."""

    def function(x, w):
        h = F.gelu(x.mul(1.0))
        write(h)
        return F.linear(h, w)

    return function


WRITES = {
    "add_": lambda h: h.add_(3.0),
    "+=": lambda h: h.__iadd__(3.0),
    "copy_": lambda h: h.copy_(torch.ones_like(h)),
    "setitem": lambda h: h.__setitem__((slice(None), 0), 5.0),
    "a view of it": lambda h: h.view(-1)[3:20].mul_(4.0),
    "no_grad": lambda h: h.detach().add_(3.0),
    "out=": lambda h: torch.add(h.detach(), 2.0, out=h.detach()),
    "mul_": lambda h: h.mul_(2.0),
    "clamp_": lambda h: h.clamp_(min=0.1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_lineage_is_never_used(write):
    assert_equal(*both(overwritten(WRITES[write]), (5, 8), (3, 8)))


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_view_is_never_used(write):
    def function(x, w):
        h = F.gelu(x.mul(1.0))
        part = h.transpose(0, 1)
        WRITES[write](h)
        return F.linear(part.transpose(0, 1), w)

    assert_equal(*both(function, (5, 8), (3, 8)))


def test_a_stale_product_is_never_scaled():
    def function(x, w, s):
        h = x.mul(1.0)
        y = F.linear(h, w)
        y += 1
        return y * s

    assert_equal(*both(function, (5, 8), (3, 8), (3,)))


def test_the_input_of_a_scaled_linear_may_be_written_to():
    """With codes the backward does not need the tensor, but its gradient must still go where the Linear took it."""
    plain, _ = both(lambda x, w, s: F.linear(x.mul(1.0), w) * s, (5, 8), (3, 8), (3,))

    def function(x, w, s):
        h = x.mul(1.0)
        y = F.linear(h, w)
        h.mul_(2)
        return y * s

    torch.manual_seed(0)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 8), (3, 8), (3,))
    ]
    with compress(Policy(min_bytes=0)):
        output = function(*leaves)
    assert_equal(plain, torch.autograd.grad(output.square().sum(), leaves), 0.02)


def test_writing_to_a_coded_tensor_is_allowed_and_right():
    def function(x, w):
        h = x.mul(1.0)
        y = F.linear(h, w)
        h += 1
        return y + h.sum()

    torch.manual_seed(0)
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        function(x, w).sum().backward()
    expected = torch.autograd.grad((F.linear(x, w) + (x + 1).sum()).sum(), (x, w))
    with compress(Policy(min_bytes=0)):
        output = function(x, w)
    for f, e in zip(torch.autograd.grad(output.sum(), (x, w)), expected, strict=True):
        assert (f - e).norm() < 0.02 * e.norm()


@pytest.mark.parametrize(
    "operator", [torch.exp, torch.sigmoid, torch.sin, F.gelu, lambda x: x.softmax(-1)]
)
@pytest.mark.parametrize("policy", [LOSSLESS, Policy()], ids=["lossless", "small"])
def test_writing_to_a_tensor_kept_whole_is_the_error_that_pytorch_raises(operator, policy):
    x = torch.randn(5, 8).requires_grad_()
    with compress(policy):
        h = x.add(0.0)
        y = operator(h)
        h.add_(1)
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + h.sum()).backward()


def test_normalize_lets_its_output_be_written_to():
    def function(x, w):
        y = F.normalize(x.mul(1.0), dim=-1)
        y *= 2
        return F.linear(y, w)

    assert_equal(*both(function, (5, 8), (3, 8)))
    assert_equal(*both(function, (5, 8), (3, 8), policy=Policy()))


def test_the_product_keeps_its_own_gradient_when_asked():
    x, w, s = (
        torch.randn(4, 8),
        torch.randn(3, 8, requires_grad=True),
        torch.randn(3, requires_grad=True),
    )
    seen = []
    with compress(LOSSLESS):
        y, z = F.linear(x, w), F.linear(x, w)
        y.retain_grad()
        z.register_hook(lambda g: seen.append(g))
        total = (y * s).sum() + (z * s).sum()
    total.backward()
    expected = s.detach().expand(4, 3)
    assert torch.equal(y.grad, expected)
    assert torch.equal(seen[0], expected)


def test_one_tensor_for_many_layers_is_coded_once():
    layers = nn.ModuleList(nn.Linear(COLS, 8) for _ in range(5))
    size, output = kept(
        lambda x: sum(f(x) for f in layers), activation(ROWS, COLS), parameters=layers.parameters()
    )
    assert size == codes(ROWS, COLS)
    output.sum().backward()
    assert all(torch.equal(f.weight.grad, layers[0].weight.grad) for f in layers)


def test_weight_sharing():
    def function(x, w):
        return F.linear(F.gelu(F.linear(F.gelu(F.linear(x, w)), w)), w.t())

    for recompute in ("none", "cheap", "linear"):
        assert_equal(
            *both(
                function, (5, 8), (8, 8), policy=Policy(bits=32, min_bytes=0, recompute=recompute)
            )
        )


def test_detach_and_no_grad_inside():
    def function(x, w):
        h = F.gelu(x.mul(1.0))
        with torch.no_grad():
            g = F.linear(h, w).sigmoid()
        return F.linear(h, w) * g + F.linear(h.detach(), w)

    assert_equal(*both(function, (5, 8), (3, 8)))


def test_views_that_need_the_layout_they_had():
    def function(x, w):
        h = F.gelu(x.mul(1.0)).to(memory_format=torch.channels_last)
        return F.linear(h.permute(0, 2, 3, 1).view(-1, 8), w)

    assert_equal(*both(function, (2, 8, 3, 5), (4, 8)))

    def normed(x, w):
        h = F.group_norm(x.contiguous(memory_format=torch.channels_last), 2)
        return F.linear(h.permute(0, 2, 3, 1).view(-1, 8), w)

    assert_equal(*both(normed, (2, 8, 3, 5), (4, 8)))


class PreBackwardFunctionForModule(torch.autograd.Function):
    """Has the name of the function that ZeRO-3 passes the inputs of a module through."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("zero3_hooked", [False, True])
def test_a_lineage_knows_a_tensor_that_was_passed_on_if_it_is_told_to(zero3_hooked):
    x = torch.ones(3, requires_grad=True) * 2
    lineage = Lineage(zero3_hooked=True) if zero3_hooked else Lineage()
    lineage.set(x, "the stash of x")
    found = lineage.get(PreBackwardFunctionForModule.apply(x))
    assert found == ("the stash of x" if zero3_hooked else None)
