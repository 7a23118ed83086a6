"""Numbers inside the C++ kernels: conversion between bfloat16 and float32, and the error of the
approximations of GELU and its slope."""

import math

import pytest
import torch

from mesa_train.kernels import reference

EVERY = torch.arange(2**16, dtype=torch.int32)


def bits(x):
    """Of bfloat16. PyTorch's own conversions disagree about the bits of a NaN; ours has one."""
    return x.view(torch.int16).int() & 0xFFFF


def bits_of_cast(x):
    return torch.where(x.isnan(), 0x7FC0, bits(x.bfloat16()))


def one_a_group(values):
    """Codes 0 of groups of 32 whose scale is 0 and whose zero are these bfloat16 (n,): they decode
    to them. Two vectors of AVX-512, so that each store is of one number."""
    scales = torch.zeros(len(values), 1, 2, dtype=torch.bfloat16)
    scales[:, 0, 1] = values
    return torch.zeros(len(values), 32, dtype=torch.uint8), scales


def test_every_bfloat16_is_read_and_written(native):
    """Each through float32 and back, beside ordinary numbers and beside its own kind."""
    values = EVERY.to(torch.int16).view(torch.bfloat16)
    wide = native.affine_decode(*one_a_group(values), 8, 32, torch.float32)
    # -0.0 is the sum of a product 0 and it.
    expected = torch.where(values == 0, 0.0, values.float())
    torch.testing.assert_close(
        wide, expected[:, None].expand(-1, 32), rtol=0, atol=0, equal_nan=True
    )

    narrow = native.affine_decode(*one_a_group(values), 8, 32, torch.bfloat16)
    assert torch.equal(bits(narrow), bits_of_cast(expected)[:, None].expand(-1, 32))


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_rounding_to_bfloat16_is_pytorchs(native, low):
    """All upper halves of a float32 with a lower half that is exact, just off, or at or around a tie:
    NaN, infinities, subnormal numbers and what overflows among them."""
    words = (EVERY << 16) | low
    values = words.view(torch.float32)
    # Through scale_backward: its second output is the gradient in another dtype. Rows of 32 mix kinds
    # in a vector, and of 33 leave a short last one.
    for cols in (32, 33):
        padded = torch.cat((values, values[: -len(values) % cols])).view(-1, cols)
        _, narrow, _ = native.scale_backward(padded, torch.ones(cols), torch.bfloat16)
        assert torch.equal(bits(narrow), bits_of_cast(padded))
        # And by decode, which stores two vectors at once: 0 + each as a bias of one row.
        zero = torch.zeros(len(padded), cols, dtype=torch.uint8)
        for row in padded[:: len(padded) // 64]:
            coded = zero[:1], torch.zeros(1, 1, 2, dtype=torch.bfloat16)
            stored = native.affine_decode(*coded, 8, cols, torch.bfloat16, None, row)
            assert torch.equal(bits(stored[0]), bits_of_cast(row + 0.0))


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_slope"),
    # What activations.h states of its polynomials (of the value: over max(1, |x|)), and then half
    # a rounding to dtype.
    [(torch.float32, 1e-6, 1.2e-6), (torch.bfloat16, 1e-4, 4.5e-4)],
)
def test_gelu_is_as_close_as_stated(native, dtype, of_value, of_slope):
    x = torch.linspace(-12, 12, 4096, dtype=torch.float64).bfloat16()
    coded = one_a_group(x)
    x = x.double()
    cdf = 0.5 * torch.erfc(-x * math.sqrt(0.5))
    slope = cdf + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    rounding = torch.finfo(dtype).eps / 2

    value = native.activation_decode(*coded, 8, 32, dtype, "gelu").double()
    error = (value - (x * cdf)[:, None]).abs() - rounding * value.abs()
    assert (error.amax(1) / x.abs().clamp(min=1)).max() <= of_value
    grad = torch.ones(len(x), 32, dtype=dtype)
    actual = native.activation_backward(grad, *coded, 8, "gelu").double()
    error = (actual - slope[:, None]).abs() - rounding * actual.abs()
    assert error.max() <= of_slope


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelus_forward_is_as_close_in_every_dtype(dtype):
    x = torch.linspace(-12, 12, 4096).to(dtype).view(32, 128)
    expected = x.double() * 0.5 * torch.erfc(-x.double() * math.sqrt(0.5))
    value = torch.ops.mesa_train.activation_encode(x, "gelu", 8, 128, False, 0)[0].double()
    error = (value - expected).abs() - torch.finfo(dtype).eps / 2 * expected.abs()
    # 5e-7 in pieces and 8e-7 as a polynomial, over max(1, |x|); float16 ends at 6e-8, in steps of that.
    assert (error / x.double().abs().clamp(min=1)).max() <= 1e-6


def test_at_fewer_bits_gelu_is_looked_up_to_the_same_error(native):
    x = torch.randn(64, 128)
    for bits_ in (4, 2):
        coded = reference.affine_encode(x, bits_, 128, False, 0)
        decoded = reference._decode(*coded, bits_, 128).double()
        expected = decoded * 0.5 * torch.erfc(-decoded * math.sqrt(0.5))
        value = native.activation_decode(*coded, bits_, 128, torch.float32, "gelu").double()
        assert ((value - expected).abs() / decoded.abs().clamp(min=1)).max() <= 1e-6
