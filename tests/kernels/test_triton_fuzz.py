"""Random shapes, groups, strides, dtypes and constants: every Triton kernel against the reference."""

import random

import kernel_cases
import pytest
import torch
import triton_interpreter
from seeding import seed_torch

from mesa_train.kernels import reference, schemas
from mesa_train.kernels.triton import schemas as triton_schemas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# About a minute in the interpreter.
CASES = 45


def view(choose: random.Random, rows: int, cols: int, dtype: torch.dtype, scale=1.0):
    """A matrix of random values with random strides and alignment."""
    x = (torch.randn(rows, 3 * cols + 1) * scale).to(dtype)
    return choose.choice(
        [
            lambda: x[:, :cols].contiguous(),
            lambda: x[:, cols : 2 * cols],
            lambda: x[:, 1 : 1 + 2 * cols : 2],
            lambda: x[:, :cols].t().contiguous().t(),
            lambda: x[:1, :cols].expand(rows, cols),
            lambda: x.flatten()[1 : 1 + rows * cols].view(rows, cols),
        ]
    )()


def special(choose: random.Random, rows: int, cols: int, dtype: torch.dtype):
    """A matrix with NaN, infinities, denormal and huge values, or a `view`."""
    if choose.random() < 0.5:
        return view(choose, rows, cols, dtype, 10 ** choose.uniform(-3, 3))
    return kernel_cases.special(rows, cols, dtype, choose.randrange(10**6))


def same_codes(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), e.view(torch.uint8))


def close(actual, expected, dtype, sums=1):
    """Equal, strides too, up to the rounding to `dtype` and the order of `sums` float32 additions."""
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(
        actual, expected, rtol=eps, atol=eps * sums**0.5, equal_nan=True, check_stride=True
    )


def check_codes(ops, choose, rows, cols, bits, size):
    """The operators that write codes: equal to the reference, bit for bit."""
    code = bits, size, choose.random() < 0.5, choose.randrange(-(2**62), 2**62)
    x = special(choose, rows, cols, choose.choice(DTYPES))
    same_codes(ops["affine_encode"](x, *code), reference.affine_encode(x, *code))
    mean = torch.randn(rows) if choose.random() < 0.5 else None
    rstd = view(choose, rows, 1, torch.float32)[:, 0].abs()
    args = x, mean, rstd, *code
    same_codes(ops["normalized_encode"](*args), reference.normalized_encode(*args))
    same_codes([ops["bitmask_positive"](x)], [reference.bitmask_positive(x)])
    mask = x > 0
    bits_of = reference.bitmask_encode(mask)
    same_codes([ops["bitmask_encode"](mask)], [bits_of])
    factor = choose.choice([1.0, 1.25, 3.0])
    grad = view(choose, rows, cols, x.dtype)
    close(
        ops["bitmask_apply"](grad, bits_of, factor),
        reference.bitmask_apply(grad, bits_of, factor),
        grad.dtype,
    )


def check_values(ops, choose, rows, cols, bits, size):
    """The operators that read codes."""
    coded = reference.affine_encode(torch.randn(rows, cols) * 2, bits, size, False, 0)
    dtype, kind = choose.choice(DTYPES), choose.choice(list(reference.ACTIVATIONS))
    affine = [torch.randn(cols) if choose.random() < 0.5 else None for _ in range(2)]
    dither = choose.choice((None, 0, choose.randrange(-(2**62), 2**62)))
    args = *coded, bits, cols, dtype, *affine, dither
    torch.testing.assert_close(
        ops["affine_decode"](*args), reference.affine_decode(*args), rtol=0, atol=0
    )
    args = *coded, bits, cols, dtype, kind
    close(ops["activation_decode"](*args), reference.activation_decode(*args), dtype)
    grad = view(choose, rows, cols, dtype)
    args = grad, *coded, bits, kind
    dx, y = reference.activation_pair(*args)
    close(ops["activation_backward"](*args), dx, dtype)
    found = ops["activation_pair_sum"](*args)
    for pair in (ops["activation_pair"](*args), found[:2]):
        close(pair[0], dx, dtype)
        close(pair[1], y, dtype)
    close(found[2], found[0].float().sum(0), torch.float32, rows)
    out = choose.choice((torch.float32, torch.bfloat16))
    args = grad, *coded, torch.rand(rows), affine[0], bits, choose.random() < 0.5, out, dither
    actual, expected = ops["norm_backward"](*args), reference.norm_backward(*args)
    close(actual[0], expected[0], out, 4)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        close(a, e, torch.float32, 4 * rows)
    args = grad, torch.randn(cols), out
    actual, expected = ops["scale_backward"](*args), reference.scale_backward(*args)
    close(actual[0], expected[0], out)
    close(actual[1], expected[1], out)
    close(actual[2], expected[2], torch.float32, rows)
    soft = reference.affine_encode(torch.randn(rows, cols).softmax(1), bits, size, False, 0)
    args = grad, *soft, bits, dither
    close(ops["softmax_backward"](*args), reference.softmax_backward(*args), dtype, 4)


def check_forwards(ops, choose, rows, cols, bits, size):
    """The fused forwards. Codes of a norm depend on the order of sums, so they are not compared."""
    code = bits, size, choose.random() < 0.5, choose.randrange(2**31)
    x = view(choose, rows, cols, choose.choice(DTYPES))
    out = choose.choice((torch.float32, torch.bfloat16))
    args = x, choose.choice(list(reference.ACTIVATIONS)), *code
    actual, expected = ops["activation_encode"](*args), triton_schemas.activation_encode(*args)
    close(actual[0], expected[0], x.dtype)
    same_codes(actual[1:], expected[1:])
    actual = ops["softmax_encode"](x, out, *code)
    close(actual[0], x.float().softmax(1).to(out), out)
    same_codes(actual[1:], reference.affine_encode(actual[0], *code))
    if cols > 1:
        args = x, torch.randn(cols), None, 1e-3, choose.random() < 0.5, out, *code
        actual, expected = ops["norm_encode"](*args), triton_schemas.norm_encode(*args)
        close(actual[0], expected[0], out, 16)
        close(actual[1], expected[1], torch.float32, 16)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(CASES))
def test_random_cases(triton, monkeypatch, case):
    ops = {**vars(triton), **vars(triton_interpreter.apart())}
    from mesa_train.kernels.triton import columns

    choose = random.Random(case)
    seed_torch(case)
    count = choose.choice((1, 2, 5))
    monkeypatch.setattr(columns, "multiprocessors", lambda _: count)
    rows, cols = choose.randint(1, 60), round(2 ** choose.uniform(0, 9))
    size = choose.choice((1, 3, 7, 16, 64, 128, cols, cols + 5, max(1, cols // 2)))
    # The pair has a program for each unit of a row, which the interpreter runs one by one.
    size = max(size, cols // 40)
    check = (check_codes, check_values, check_forwards)[case % 3]
    check(ops, choose, rows, cols, choose.choice(schemas.BITS), size)
