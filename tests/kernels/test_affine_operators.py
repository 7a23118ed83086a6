"""affine_encode, affine_decode and normalized_encode: reference, C++ and numpy, code for code."""

import kernel_cases
import numpy as np
import numpy_twin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesa_train.codecs.affine import Affine, code_bytes, group_shape
from mesa_train.kernels import packing, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = (8, 6, 5, 4, 3, 2)
# (rows, cols, group_size): empty, single, odd, a group a row, several stretches a row.
SHAPES = (
    *((0, 5, 4), (5, 0, 4), (1, 1, 1), (9, 1, 64), (12, 33, 7), (40, 64, 3)),
    *((64, 130, 64), (50, 257, 1000), (11, 4099, 64), (3, 5000, 5000)),
)

bits_param = pytest.mark.parametrize("bits", BITS)
stochastic_param = pytest.mark.parametrize("stochastic", [False, True])


def assert_same(actual, expected):
    """Equal bit for bit, NaN included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    as_bytes = [t.contiguous().view(torch.uint8) if t.numel() else t for t in (actual, expected)]
    assert torch.equal(*as_bytes)


def assert_same_values(actual, expected):
    """Equal, any NaN to any NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- against numpy ---


@bits_param
@stochastic_param
@pytest.mark.parametrize(("cols", "group_size"), [(1, 1), (13, 5), (24, 64), (31, 8)])
def test_equals_the_numpy_twin(ops, bits, stochastic, cols, group_size):
    x = kernel_cases.special(16, cols, torch.float32)
    codes, scales = ops.affine_encode(x, bits, group_size, stochastic, 7)
    q, scale_bits = numpy_twin.encode(x.numpy(), bits, group_size, stochastic, 7)
    assert_same(codes, torch.from_numpy(numpy_twin.pack(q, bits)))
    np.testing.assert_array_equal(scales.view(torch.int16).numpy().view(np.uint16), scale_bits)
    value = ops.affine_decode(codes, scales, bits, cols, torch.float32)
    np.testing.assert_array_equal(value.numpy(), numpy_twin.decode(q, scale_bits))
    value = ops.affine_decode(codes, scales, bits, cols, torch.float32, None, None, 7)
    expected = numpy_twin.decode_dithered(q, scale_bits, bits, 7)
    np.testing.assert_array_equal(value.numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=20),
    bits=st.sampled_from(BITS),
    group_size=st.integers(1, 24),
    stochastic=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_float32(values, bits, group_size, stochastic, seed):
    x = torch.tensor([values], dtype=torch.float32)
    codes, scales = Affine(bits, group_size, stochastic, seed).encode(x)
    q, scale_bits = numpy_twin.encode(x.numpy(), bits, group_size, stochastic, seed)
    assert_same(codes, torch.from_numpy(numpy_twin.pack(q, bits)))
    np.testing.assert_array_equal(scales.view(torch.int16).numpy().view(np.uint16), scale_bits)

    # A group decodes to finite values exactly if all of it is finite.
    _, size = group_shape(len(values), group_size)
    value = Affine(bits, group_size).decode((codes, scales), len(values), torch.float32)
    for group, decoded in zip(x.split(size, 1), value.split(size, 1), strict=True):
        assert decoded.isfinite().all() == group.isfinite().all()
        assert decoded.isnan().all() or group.isfinite().all()


# --- C++ against the reference ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
def test_native_equals_reference(native, dtype, rows, cols, group_size):
    x = kernel_cases.special(rows, cols, dtype)
    views = {
        "contiguous": x,
        "row stride": kernel_cases.special(rows, 2 * cols, dtype)[:, :cols],
        "column stride": kernel_cases.special(rows, 2 * cols, dtype)[:, ::2],
        "transposed": kernel_cases.special(cols, rows, dtype).t(),
        "expanded": x[:1].expand(rows, cols),
    }
    for view in views.values():
        for bits in BITS:
            for stochastic in (False, True):
                actual = native.affine_encode(view, bits, group_size, stochastic, 12345)
                expected = reference.affine_encode(view, bits, group_size, stochastic, 12345)
                for a, e in zip(actual, expected, strict=True):
                    assert_same(a, e)


@stochastic_param
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_have_the_codes_that_each_has_alone(native, dtype, stochastic):
    # Groups that divide a part and not; several rows a stretch, and several stretches a row.
    for rows, cols, group_size in (
        (12, 33, 7),
        (37, 384, 128),
        (5, 4100, 64),
        (0, 8, 4),
        (3, 0, 4),
    ):
        for parts in (1, 2, 3):
            wide = kernel_cases.special(rows, 3 * cols, dtype)
            x = wide[:, (3 - parts) * cols :]
            for bits in BITS:
                code = bits, group_size, stochastic, 12345
                actual = native.affine_encode_parts(x, parts, *code)
                expected = reference.affine_encode_parts(x, parts, *code)
                alone = [native.affine_encode(p, *code) for p in x.tensor_split(parts, 1)]
                assert len(actual) == 2 * parts
                for a, e, own in zip(actual, expected, sum(alone, ()), strict=True):
                    assert_same(a, e)
                    assert_same(a, own)


@bits_param
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_decodes_like_reference(native, bits, dtype):
    for rows, cols, group_size in SHAPES:
        x = kernel_cases.special(rows, cols, torch.float32)
        coded = reference.affine_encode(x, bits, group_size, False, 0)
        weight, bias = torch.randn(cols).to(torch.bfloat16), torch.randn(cols)
        for affine in ((None, None), (weight, None), (None, bias), (weight, bias)):
            for dither in (None, 3, -1):
                args = *coded, bits, cols, dtype, *affine, dither
                assert_same_values(native.affine_decode(*args), reference.affine_decode(*args))


@stochastic_param
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [False, True])
def test_normalized_encode(ops, stochastic, dtype, centered):
    x = torch.randn(20, 2 * 130).to(dtype)[:, :130]
    mean = torch.randn(20) if centered else None
    rstd = torch.rand(20).to(torch.bfloat16)
    normalized = (x.float() - (mean[:, None] if centered else 0)) * rstd.float()[:, None]
    actual = ops.normalized_encode(x, mean, rstd, 8, 64, stochastic, 3)
    expected = reference.affine_encode(normalized, 8, 64, stochastic, 3)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_normalized_encode_in_the_corners(native, dtype):
    # Means and deviations that no norm has: the ends of a group are still those of its values.
    for rstd in (1.0, -2.0, 0.0, -0.0, 1e30, 1e-40, float("inf"), float("nan")):
        x = kernel_cases.special(40, 130, dtype)
        mean = torch.where(torch.arange(40) % 3 == 0, x[:, 5].float(), 0.25)
        args = (x, mean, torch.full((40,), rstd), 8, 64, False, 3)
        for a, e in zip(
            native.normalized_encode(*args), reference.normalized_encode(*args), strict=True
        ):
            assert_same(a, e)


def test_same_codes_for_any_number_of_threads(native, threads):
    x = torch.randn(64, 4099)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(native.affine_encode(x, 2, 64, True, 0))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# --- what the code promises ---


@bits_param
@stochastic_param
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_error_is_bounded_by_the_step(ops, bits, stochastic, scale):
    x = torch.randn(50, 130) * scale
    codes, scales = ops.affine_encode(x, bits, 64, stochastic, 0)
    error = (ops.affine_decode(codes, scales, bits, 130, torch.float32) - x).abs()
    step = scales[..., 0].float().repeat_interleave(group_shape(130, 64)[1], 1)[:, :130]
    # Float32 slop: of x - zero, and of zero + q * scale.
    slop = 4 * torch.finfo(torch.float32).eps * x.abs().max()
    assert (error <= step * (1.0 if stochastic else 0.5) + slop).all()


@bits_param
@stochastic_param
def test_both_ends_saturate(ops, bits, stochastic):
    x = torch.linspace(-1, 1, 64)[None]
    values = packing.unpack(ops.affine_encode(x, bits, 64, stochastic, 0)[0], bits, 64)
    assert values[0, 0] <= 1
    # scale is rounded up by at most 1/128, so the top code may be a little below 2**bits - 1.
    assert 2**bits - 1 >= values[0, -1] >= (2**bits - 1) * 127 / 128 - 1
    assert (values.diff() >= (-1 if stochastic else 0)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.140625, 1e-38, 3e38])
def test_constant_group_is_exact_where_bfloat16_is(ops, value):
    x = torch.full((2, 64), value).to(torch.bfloat16).float()
    codes, scales = ops.affine_encode(x, 4, 64, False, 0)
    assert not scales[..., 0].any()
    torch.testing.assert_close(ops.affine_decode(codes, scales, 4, 64, torch.float32), x, **EXACT)


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_group_with_nan_or_inf_decodes_to_nan(ops, poison):
    x = torch.randn(3, 128)
    x[1, 70] = poison
    codes, scales = ops.affine_encode(x, 8, 64, True, 0)
    value = ops.affine_decode(codes, scales, 8, 128, torch.bfloat16)
    assert value[1, 64:].isnan().all()
    assert not codes[1, 64:].any()
    assert value[1, :64].isfinite().all()
    assert value[[0, 2]].isfinite().all()


@bits_param
def test_finite_input_never_decodes_to_nan_or_inf(ops, bits):
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top, -top, 1.0], [top, top, top], [-top, -top, 0.0], [top, 0.0, 1.0]])
    codes, scales = ops.affine_encode(x, bits, 4, False, 0)
    value = ops.affine_decode(codes, scales, bits, 3, torch.float32)
    assert value.isfinite().all()
    # One sign: the usual bound, and a step more at the top where the scale was made smaller.
    error = (value - x)[1:].abs() / top
    assert (error <= 1.5 / (2**bits - 1)).all()


@bits_param
def test_a_step_below_the_normal_numbers_becomes_0(ops, bits):
    x = torch.tensor([[1e-44, 0.0, -1e-44, 5e-45]])
    codes, scales = ops.affine_encode(x, bits, 4, False, 0)
    assert not codes.any()
    assert not scales[..., 0].any()
    value = ops.affine_decode(codes, scales, bits, 4, torch.float32)
    assert (value == scales[..., 1].float()).all()
    assert ((value - x).abs() < 1e-39).all()


# --- stochastic rounding ---


@bits_param
def test_stochastic_rounding_is_unbiased(native, bits):
    x = torch.rand(1, 64).expand(4000, 64)  # a row draws other numbers than the next
    codes, scales = native.affine_encode(x, bits, 64, True, 1)
    value = native.affine_decode(codes, scales, bits, 64, torch.float64)
    step = scales[0, 0, 0].double()
    # The mean of 4000 draws whose deviation is at most step / 2; six deviations, 64 columns.
    assert ((value.mean(0) - x[0]).abs() < 6 * step / 2 / 4000**0.5).all()
    # Neighbouring columns and rows are not rounded alike.
    rounded = (value - x.double()) / step
    rounded = (rounded - rounded.mean(0)) / rounded.std(0).clamp(min=0.05)
    assert (rounded[:, 1:] * rounded[:, :-1]).mean().abs() < 0.02
    assert (rounded[1:] * rounded[:-1]).mean().abs() < 0.02


@bits_param
def test_dither_is_unbiased_with_half_the_variance(native, bits):
    x = torch.rand(1, 64).expand(4000, 64)
    codes, scales = native.affine_encode(x, bits, 64, True, 1)
    decoded = [
        native.affine_decode(codes, scales, bits, 64, torch.float64, None, None, seed)
        for seed in (None, 1, 2)
    ]
    step = scales[0, 0, 0].double()
    stochastic, dither, other = [(value - x) / step for value in decoded]
    # A uniform error over one step, whatever the value is.
    assert (dither.mean(0).abs() < 6 / 12**0.5 / 4000**0.5).all()
    assert ((dither.var(0) - 1 / 12).abs() < 0.01).all()
    assert dither.abs().max() <= 0.5 + 2.0**-8
    assert abs(stochastic.var() / dither.var() - 2) < 0.5
    # The draws of another seed do not fit the codes: they add their own variance.
    assert other.var() > 1.3 * stochastic.var()


@bits_param
def test_dither_of_finite_groups_is_finite(ops, bits):
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top, -top, 1.0], [top, top, top], [-top, -top, 0.0], [1e37, 0.0, -1e37]])
    codes, scales = ops.affine_encode(x, bits, 4, True, 9)
    value = ops.affine_decode(codes, scales, bits, 3, torch.float32, None, None, 9)
    assert value.isfinite().all()
    # One sign, as for the finite input above. A group without its draws is off by up to a step.
    error = (value - x)[1:].abs() / top
    assert (error <= 2 / (2**bits - 1)).all()


def test_stochastic_codes_depend_on_data_and_seed_alone(ops):
    x = torch.randn(8, 128)
    before = torch.get_rng_state()
    first = ops.affine_encode(x, 4, 64, True, 5)
    torch.rand(3)
    again = ops.affine_encode(x.clone(), 4, 64, True, 5)
    other = ops.affine_encode(x, 4, 64, True, 6)
    torch.set_rng_state(before)
    ops.affine_encode(x, 4, 64, True, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])


def test_seed_counts_by_its_low_32_bits(ops):
    x = torch.randn(4, 64)
    expected = ops.affine_encode(x, 4, 64, True, 5)[0]
    assert torch.equal(ops.affine_encode(x, 4, 64, True, 5 + 2**32)[0], expected)
    assert torch.equal(
        ops.affine_encode(x, 4, 64, True, -1)[0], ops.affine_encode(x, 4, 64, True, 2**32 - 1)[0]
    )


# --- the codec ---


@given(cols=st.integers(0, 3000), group_size=st.integers(1, 500))
def test_group_shape(cols, group_size):
    groups, size = group_shape(cols, group_size)
    assert groups == -(-cols // group_size)
    assert size <= group_size
    # Every group has something, and together they have everything.
    assert groups == 0 or (groups - 1) * size < cols <= groups * size


@bits_param
def test_codec_bytes_and_round_trip(bits):
    codec = Affine(bits, 48, True, 1)
    x = torch.randn(7, 100, dtype=torch.float64)
    coded = codec.encode(x)
    assert codec.bytes(7, 100) == sum(t.numel() * t.element_size() for t in coded)
    assert coded[0].shape == (7, code_bytes(100, bits))
    assert codec.decode(coded, 100, torch.float64).dtype == torch.float64
    normalized = codec.encode_normalized(x, torch.zeros(7), torch.ones(7))
    assert torch.equal(normalized[0], coded[0])


@bits_param
def test_a_dithered_codec_decodes_with_its_seed(bits):
    codec = Affine(bits, 48, True, 5, dither=True)
    x = torch.randn(7, 100)
    coded = codec.encode(x)
    assert all(map(torch.equal, coded, Affine(bits, 48, True, 5).encode(x)))
    expected = reference.affine_decode(*coded, bits, 100, torch.float32, None, None, 5)
    assert torch.equal(codec.decode(coded, 100, torch.float32), expected)
    # The operators of activations read the same values.
    grad = torch.randn(7, 100)
    wide = expected.double().requires_grad_()
    y = torch.nn.functional.gelu(wide)
    y.backward(grad.double())
    dx, value, total = codec.activation_pair_sum(coded, grad, "gelu")
    torch.testing.assert_close(value.double(), y.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.double(), wide.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, dx.sum(0))
    assert torch.equal(codec.activation_decode(coded, 100, torch.float32, "gelu"), value)
    assert torch.equal(codec.activation_backward(coded, grad, "gelu"), dx)


@pytest.mark.parametrize(("field", "value"), [("bits", 7), ("bits", 16), ("group_size", 0)])
def test_codec_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .* got {value}"):
        Affine(**{field: value})


def test_dither_needs_stochastic_codes():
    with pytest.raises(ValueError, match="dither=True needs stochastic=True"):
        Affine(4, dither=True)
