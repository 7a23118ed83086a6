"""Compares the C++ kernels, compiled as the environment says, with the reference: codes and decoded
values bit for bit, the rest within rounding. Run by test_cpu_targets.py in a process of its own."""

import kernel_cases
import torch

from mesa_train import kernels
from mesa_train.kernels import reference
from mesa_train.kernels.triton import schemas as triton_schemas

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, cols, group_size): groups below, at and above a block of every width, bytes that groups share.
SHAPES = ((12, 5, 4), (12, 33, 7), (14, 130, 64), (12, 257, 100), (11, 384, 128))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def codes(ops):
    for dtype in DTYPES:
        for rows, cols, size in SHAPES:
            x = kernel_cases.special(rows, 2 * cols, dtype)
            for view in (x[:, :cols].contiguous(), x[:, cols:], x[:, ::2]):
                for bits in (8, 6, 5, 4, 3, 2):
                    for stochastic in (False, True):
                        args = (view, bits, size, stochastic, 7)
                        coded = reference.affine_encode(*args)
                        for a, e in zip(ops.affine_encode.default(*args), coded, strict=True):
                            same(a, e)
                    affine = torch.randn(cols), torch.randn(cols)
                    for dither in (None, 7):
                        args = (*coded, bits, cols, dtype, *affine, dither)
                        same(ops.affine_decode.default(*args), reference.affine_decode(*args))


def gradients(ops):
    for dtype in DTYPES:
        # A rounding to dtype, and float32 sums of a few hundred products in another order.
        eps = torch.finfo(dtype).eps
        close = {"rtol": max(eps, 2e-6), "atol": 2e-5 + eps}
        for rows, cols, size in SHAPES:
            for bits, dither in ((8, None), (4, None), (5, 7), (3, 7)):
                coded = reference.affine_encode(torch.randn(rows, cols), bits, size, False, 0)
                grad = torch.randn(rows, cols).to(dtype)
                args = (
                    grad,
                    *coded,
                    torch.rand(rows),
                    torch.randn(cols),
                    bits,
                    True,
                    dtype,
                    dither,
                )
                for a, e in zip(
                    ops.norm_backward.default(*args), reference.norm_backward(*args), strict=True
                ):
                    torch.testing.assert_close(a, e, **close)
                args = (grad, *coded, bits, "gelu")
                for a, e in zip(
                    ops.activation_pair.default(*args),
                    reference.activation_pair(*args),
                    strict=True,
                ):
                    torch.testing.assert_close(a, e, **close)
                args = (grad, *coded, bits, dither)
                torch.testing.assert_close(
                    ops.softmax_backward.default(*args), reference.softmax_backward(*args), **close
                )
                bits_of = ops.bitmask_positive.default(grad)
                same(bits_of, reference.bitmask_positive(grad))
                same(
                    ops.bitmask_apply.default(grad, bits_of, 2.0),
                    reference.bitmask_apply(grad, bits_of, 2.0),
                )


def forwards(ops):
    for dtype in DTYPES:
        eps = torch.finfo(dtype).eps
        close = {"rtol": max(eps, 2e-6), "atol": 2e-5 + eps}
        for rows, cols, size in SHAPES:
            x = torch.randn(rows, 2 * cols).to(dtype)[:, cols:]
            y, *coded = ops.activation_encode.default(x, "gelu", 4, size, True, 7)
            expected = triton_schemas.activation_encode(x, "gelu", 4, size, True, 7)
            torch.testing.assert_close(y, expected[0], **close)
            for a, e in zip(coded, expected[1:], strict=True):
                same(a, e)
            args = (x, torch.randn(cols), None, 1e-6, True, dtype, 8, size, False, 7)
            actual, expected = ops.norm_encode.default(*args), triton_schemas.norm_encode(*args)
            for a, e in zip(actual[:2], expected[:2], strict=True):
                torch.testing.assert_close(a, e, **close)
            values = [
                reference.affine_decode(*out[2:], 8, cols, dtype) for out in (actual, expected)
            ]
            # A step of 1/255 of a range below 8, for values that fell on its other side.
            torch.testing.assert_close(*values, rtol=0, atol=8 / 255 + eps)
            y, *coded = ops.softmax_encode.default(x, dtype, 8, size, False, 7)
            torch.testing.assert_close(y, x.float().softmax(1).to(dtype), **close)
            for a, e in zip(coded, reference.affine_encode(y, 8, size, False, 7), strict=True):
                same(a, e)


def main() -> None:
    kernels.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mesa_train::affine_encode", "CPU")
    torch.manual_seed(0)
    codes(torch.ops.mesa_train)
    gradients(torch.ops.mesa_train)
    forwards(torch.ops.mesa_train)


if __name__ == "__main__":
    main()
