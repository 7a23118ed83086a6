"""At 8 and 4 bits a gradient is exactly torch's own derivative, evaluated where the codes decode to."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch

from mesa_train import Policy, compress
from mesa_train.codecs.affine import Affine
from mesa_train.kernels import reference

SHAPE = (2, 3, 40)


@pytest.fixture(params=[8, 4])
def bits(request):
    return request.param


def coded(x, bits, stochastic):
    """What a (..., cols) tensor decodes to under the default group size."""
    codec = Affine(bits, 128, stochastic, 0, dither=stochastic)
    matrix = x.detach().reshape(-1, x.shape[-1])
    return codec.decode(codec.encode(matrix), x.shape[-1], x.dtype).reshape(x.shape)


def activation(*shape, seed=0):
    return (
        (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.0)
        .requires_grad_()
        .mul(1.0)
    )


def gradients(function, inputs, grad, bits=None):
    if bits is None:
        return torch.autograd.grad(function(*inputs), inputs, grad)
    with compress(Policy(bits=bits, min_bytes=0)):
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, grad)


def assert_close(found, expected):
    # float32 rounding: the same sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_linear(bits):
    x, w = activation(*SHAPE), activation(7, 40, seed=1).detach().requires_grad_()
    grad = torch.randn(2, 3, 7)
    dx, dw = gradients(F.linear, (x, w), grad, bits)
    at = coded(x, bits, bits < 8).requires_grad_()
    expected_dx, expected_dw = gradients(F.linear, (at, w), grad)
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)
    assert not torch.allclose(dw, gradients(F.linear, (x, w), grad)[1], rtol=1e-5, atol=1e-5)


def test_matmul(bits):
    a, b = activation(2, 3, 40), activation(2, 40, 5, seed=1)
    grad = torch.randn(2, 3, 5)
    da, db = gradients(torch.matmul, (a, b), grad, bits)
    at = [coded(t, bits, bits < 8).requires_grad_() for t in (a, b)]
    expected_da, expected_db = gradients(torch.matmul, at, grad)
    assert_close(da, expected_da)
    assert_close(db, expected_db)


def test_softmax(bits):
    x = activation(*SHAPE)
    grad = torch.randn(SHAPE)
    (dx,) = gradients(lambda x: x.softmax(-1), (x,), grad, bits)
    y = coded(x.softmax(-1), bits, bits < 8)
    assert_close(dx, torch.ops.aten._softmax_backward_data(grad, y, -1, torch.float32))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "hardswish", "mish"])
def test_activation(bits, name):
    function = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}.get(name) or getattr(F, name)
    x = activation(*SHAPE)
    grad = torch.randn(SHAPE)
    (dx,) = gradients(function, (x,), grad, bits)
    assert_close(dx, gradients(function, (coded(x, bits, False).requires_grad_(),), grad)[0])


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activation_from_its_output(bits, name):
    function = getattr(torch, name)
    x = activation(*SHAPE)
    grad = torch.randn(SHAPE)
    (dx,) = gradients(function, (x,), grad, bits)
    y = coded(function(x), bits, False)
    assert_close(dx, getattr(torch.ops.aten, f"{name}_backward")(grad, y))


def test_layer_norm(bits):
    x, w, b = (
        activation(*SHAPE),
        torch.randn(40, requires_grad=True),
        torch.randn(40, requires_grad=True),
    )
    grad = torch.randn(SHAPE)
    found = gradients(lambda x, w, b: F.layer_norm(x, (40,), w, b), (x, w, b), grad, bits)
    _, mean, rstd = torch.native_layer_norm(x.detach(), (40,), w, b, 1e-5)
    x_hat = coded((x.detach() - mean) * rstd, bits, bits < 8)
    zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad, x_hat, (40,), zero, one, w.detach(), b.detach(), [True] * 3
    )
    for f, e in zip(found, (dx * rstd, dw, db), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def test_batch_norm(bits):
    x, w = activation(4, 5, 6, 7), torch.randn(5, requires_grad=True)
    grad = torch.randn(4, 5, 6, 7)
    found = gradients(
        lambda x, w: F.batch_norm(x, None, None, w, training=True), (x, w), grad, bits
    )
    mean, rstd = (
        x.detach().mean((0, 2, 3)),
        (x.detach().var((0, 2, 3), unbiased=False) + 1e-5).rsqrt(),
    )
    x_hat = (x.detach() - mean[:, None, None]) * rstd[:, None, None]
    # In a contiguous tensor a group lies within one channel's positions.
    x_hat = coded(x_hat.flatten(2), bits, bits < 8).view_as(x_hat)
    dx, dw, _ = torch.ops.aten.native_batch_norm_backward(
        grad, x_hat, w.detach(), None, None, torch.zeros(5), torch.ones(5), True, 0.0, [True] * 3
    )
    # At 4 bits the decoded x_hat of the two computations may differ by a step where x_hat itself is rounded.
    for f, e in zip(found, (dx * rstd[:, None, None], dw), strict=True):
        assert (f - e).norm() < 0.02 * e.norm()


def test_relu_keeps_its_derivative_exactly(bits):
    x = activation(*SHAPE)
    grad = torch.randn(SHAPE)
    for function in (F.relu, F.relu6, F.leaky_relu, F.hardsigmoid):
        (dx,) = gradients(function, (x,), grad, bits)
        torch.testing.assert_close(dx, gradients(function, (x,), grad)[0], rtol=1e-6, atol=1e-6)


def test_conv(bits):
    x, w = activation(2, 3, 8, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    grad = torch.randn(2, 4, 6, 3)
    found = gradients(F.conv2d, (x, w), grad, bits)
    at = coded(x.flatten(2), bits, bits < 8).view_as(x).requires_grad_()
    for f, e in zip(found, gradients(F.conv2d, (at, w), grad), strict=True):
        assert_close(f, e)


def test_attention_uses_the_exact_logsumexp_and_decoded_operands(bits):
    q, k, v = [activation(1, 2, 6, 16, seed=s) for s in range(3)]
    grad = torch.randn(1, 2, 6, 16)
    found = gradients(F.scaled_dot_product_attention, (q, k, v), grad, bits)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    at = [coded(t, bits, bits < 8) for t in (q, k, v, out)]
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *at, logsumexp.detach(), 0.0, False
    )
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e)


def test_dropout_replays_the_mask_it_drew(bits):
    x, w = activation(*SHAPE), torch.randn(5, 40, requires_grad=True)
    grad = torch.randn(2, 3, 5)
    seed_torch(3)
    dx, dw = gradients(lambda x, w: F.linear(F.dropout(F.gelu(x), 0.3), w), (x, w), grad, bits)
    at = coded(x, bits, False).requires_grad_()
    seed_torch(3)
    expected_dx, expected_dw = gradients(
        lambda x, w: F.linear(F.dropout(F.gelu(x), 0.3), w), (at, w), grad
    )
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)


def test_stochastic_rounding_is_unbiased():
    """Averaged over many tokens that are alike, 4-bit weight gradients lose their error; nearest rounding keeps it."""
    seed_torch(0)
    x = (torch.randn(1, 64) + 0.01 * torch.randn(4096, 64)).requires_grad_().mul(1.0)
    w = torch.randn(3, 64, requires_grad=True)
    grad = torch.ones(4096, 3)
    (exact,) = torch.autograd.grad(F.linear(x, w), w, grad)
    errors = {}
    for rounding in ("nearest", "stochastic"):
        with compress(Policy(bits=4, min_bytes=0, rounding=rounding)):
            y = F.linear(x, w)
        (found,) = torch.autograd.grad(y, w, grad)
        errors[rounding] = ((found - exact).norm() / exact.norm()).item()
    # 4096 draws: a scale of a few tenths over sqrt(4096).
    assert errors["stochastic"] < 0.01
    assert errors["nearest"] > 3 * errors["stochastic"]


def test_the_codec_under_test_is_the_reference():
    x = torch.randn(5, 40)
    codes, scales = reference.affine_encode(x, 8, 128, False, 0)
    found = coded(x, 8, False)
    assert torch.equal(found, reference.affine_decode(codes, scales, 8, 40, torch.float32))
