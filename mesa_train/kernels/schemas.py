"""Schemas of all operators: their checks, their fakes, and the reference as their body.

An import of this file defines the operators under `torch.ops.mesa_train`, on every device. The C++
kernels are registered for the CPU afterwards. All operators are forward-only, because autograd
Functions call them. The fakes read only shapes. So a footprint can be counted on the meta device,
and a model with dynamic shapes compiles.

The operators use `Library.define` instead of `torch.library.custom_op`, which adds about 10 us a
call.
"""
# ruff: noqa: ARG001 (a fake takes all the arguments of its operator)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import packing, reference

BITS = (8, 6, 5, 4, 3, 2)

_library = torch.library.Library("mesa_train", "DEF")


# --- checks: shared by the fake and the body; the C++ repeats them ---


def _check(condition: Any, message: Callable[[], str]) -> None:
    """torch._check. A condition that is plainly True needs no call, a symbolic one is recorded."""
    if condition is not True:
        torch._check(condition, message)


def _check_matrix(name: str, tensor: Tensor) -> None:
    _check(
        tensor.dim() == 2,
        lambda: f"{name} must be 2-D (rows, cols), got shape {tuple(tensor.shape)}",
    )


def _check_floating(name: str, tensor: Tensor) -> None:
    _check(
        tensor.is_floating_point(),
        lambda: f"{name} must be a floating-point tensor, got {tensor.dtype}",
    )


def _check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is None:
        return
    _check(
        tensor.dim() == 1,
        lambda: f"{name} must be 1-D, got shape {tuple(tensor.shape)}",
    )
    _check(
        tensor.shape[0] == length,
        lambda: f"{name} must have {length} elements, got {tensor.shape[0]}",
    )


def _check_bits(bits: int) -> None:
    _check(bits in BITS, lambda: f"bits must be one of {BITS}, got {bits}")


def _check_encode(x: Tensor, bits: int, group_size: int) -> None:
    _check_matrix("x", x)
    _check_floating("x", x)
    _check_bits(bits)
    _check(group_size >= 1, lambda: f"group_size must be at least 1, got {group_size}")


def _check_codes(codes: Tensor, scales: Tensor, bits: int, rows: int, cols: int) -> None:
    _check_bits(bits)
    _check_matrix("codes", codes)
    _check(codes.dtype == torch.uint8, lambda: f"codes must be torch.uint8, got {codes.dtype}")
    _check(
        scales.dtype == torch.bfloat16 and scales.dim() == 3,
        lambda: (
            f"scales must be torch.bfloat16 (rows, groups, 2), got {scales.dtype} "
            f"{tuple(scales.shape)}"
        ),
    )
    _check(scales.shape[2] == 2, lambda: f"scales must end in 2, got {scales.shape[2]}")
    _check(
        codes.shape[0] == rows and scales.shape[0] == rows,
        lambda: (
            f"codes and scales must have {rows} rows, got {codes.shape[0]} and {scales.shape[0]}"
        ),
    )
    expected = packing.code_bytes(cols, bits)
    _check(
        codes.shape[1] == expected,
        lambda: (
            f"codes must have {expected} bytes a row for cols={cols} at "
            f"bits={bits}, got {codes.shape[1]}"
        ),
    )


def _check_kind(kind: str) -> None:
    choices = tuple(reference.ACTIVATIONS)
    _check(kind in choices, lambda: f"kind must be one of {choices}, got {kind!r}")


# --- fakes ---


def _encoded(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Empty codes and scales of (rows, cols)."""
    rows, cols = x.shape
    groups = (cols + group_size - 1) // group_size
    codes = x.new_empty((rows, packing.code_bytes(cols, bits)), dtype=torch.uint8)
    return codes, x.new_empty((rows, groups, 2), dtype=torch.bfloat16)


def _affine_encode(
    x: Tensor, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    _check_encode(x, bits, group_size)
    return _encoded(x, bits, group_size)


def _affine_encode_parts(
    x: Tensor, parts: int, bits: int, group_size: int, stochastic: bool, seed: int
) -> list[Tensor]:
    _check_encode(x, bits, group_size)
    _check(
        parts >= 1 and x.shape[1] % parts == 0,
        lambda: f"parts must divide the columns of x, got {parts} and {x.shape[1]} columns",
    )
    share = x.new_empty((x.shape[0], x.shape[1] // parts))
    return [t for _ in range(parts) for t in _encoded(share, bits, group_size)]


def _affine_decode(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    cols: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dither: int | None = None,
) -> Tensor:
    _check_codes(codes, scales, bits, codes.shape[0], cols)
    _check_vector("weight", weight, cols)
    _check_vector("bias", bias, cols)
    return codes.new_empty((codes.shape[0], cols), dtype=dtype)


def _normalized_encode(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:
    _check_encode(x, bits, group_size)
    _check_vector("mean", mean, x.shape[0])
    _check_vector("rstd", rstd, x.shape[0])
    return _encoded(x, bits, group_size)


def _norm_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bits: int,
    centered: bool,
    dtype: torch.dtype,
    dither: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_matrix("grad", grad)
    _check_floating("grad", grad)
    rows, cols = grad.shape
    _check_codes(codes, scales, bits, rows, cols)
    _check_vector("rstd", rstd, rows)
    _check_vector("weight", weight, cols)
    column_sum = grad.new_empty((cols,), dtype=torch.float32)
    return grad.new_empty((rows, cols), dtype=dtype), column_sum, torch.empty_like(column_sum)


def _activation_decode(
    codes: Tensor, scales: Tensor, bits: int, cols: int, dtype: torch.dtype, kind: str
) -> Tensor:
    _check_kind(kind)
    return _affine_decode(codes, scales, bits, cols, dtype)


def _activation_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Tensor:
    _check_kind(kind)
    _check_matrix("grad", grad)
    _check_floating("grad", grad)
    _check_codes(codes, scales, bits, grad.shape[0], grad.shape[1])
    return grad.new_empty(grad.shape)


def _activation_pair(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor]:
    dx = _activation_backward(grad, codes, scales, bits, kind)
    return dx, torch.empty_like(dx)


def _softmax_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, dither: int | None = None
) -> Tensor:
    _check_matrix("grad", grad)
    _check_floating("grad", grad)
    _check_codes(codes, scales, bits, grad.shape[0], grad.shape[1])
    return grad.new_empty(grad.shape)


def _scale_backward(
    grad: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_matrix("grad", grad)
    _check_floating("grad", grad)
    _check_vector("scale", scale, grad.shape[1])
    scaled = grad.new_empty(grad.shape, dtype=dtype)
    total = grad.new_empty((grad.shape[1],), dtype=torch.float32)
    return scaled, torch.empty_like(scaled), total


def _bitmask_encode(mask: Tensor) -> Tensor:
    _check(mask.dtype == torch.bool, lambda: f"mask must be torch.bool, got {mask.dtype}")
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


def _bitmask_positive(x: Tensor) -> Tensor:
    _check_floating("x", x)
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def _bitmask_apply(grad: Tensor, bits: Tensor, scale: float) -> Tensor:
    _check_floating("grad", grad)
    _check(bits.dtype == torch.uint8, lambda: f"bits must be torch.uint8, got {bits.dtype}")
    _check_vector("bits", bits, (grad.numel() + 7) // 8)
    return torch.empty_like(grad)


def _cast_like(x: Tensor, like: Tensor) -> Tensor:
    _check(x.dtype != like.dtype, lambda: f"x is {like.dtype} already")
    return torch.empty_like(x, dtype=like.dtype)


# --- registration ---


def _define(schema: str, fake: Callable[..., Any], body: Callable[..., Any]) -> None:
    """Register an operator with its schema, its fake and its body."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def checked(*args: Any) -> Any:
        # The fake, called on meta tensors, also checks the arguments.
        fake(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        return body(*args)

    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mesa_train::{name}", fake, lib=_library)


_define(
    "affine_encode(Tensor x, int bits, int group_size, bool stochastic, int seed)"
    " -> (Tensor codes, Tensor scales)",
    _affine_encode,
    reference.affine_encode,
)
_define(
    "affine_encode_parts(Tensor x, int parts, int bits, int group_size, bool stochastic, int seed)"
    " -> Tensor[]",
    _affine_encode_parts,
    reference.affine_encode_parts,
)
_define(
    "affine_decode(Tensor codes, Tensor scales, int bits, int cols, ScalarType dtype,"
    " Tensor? weight=None, Tensor? bias=None, int? dither=None) -> Tensor",
    _affine_decode,
    reference.affine_decode,
)
_define(
    "normalized_encode(Tensor x, Tensor? mean, Tensor rstd, int bits, int group_size,"
    " bool stochastic, int seed) -> (Tensor codes, Tensor scales)",
    _normalized_encode,
    reference.normalized_encode,
)
_define(
    "norm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor rstd, Tensor? weight,"
    " int bits, bool centered, ScalarType dtype, int? dither=None)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_backward,
    reference.norm_backward,
)
_define(
    "activation_decode(Tensor codes, Tensor scales, int bits, int cols, ScalarType dtype,"
    " str kind) -> Tensor",
    _activation_decode,
    reference.activation_decode,
)
_define(
    "activation_backward(Tensor grad, Tensor codes, Tensor scales, int bits, str kind) -> Tensor",
    _activation_backward,
    reference.activation_backward,
)
_define(
    "activation_pair(Tensor grad, Tensor codes, Tensor scales, int bits, str kind)"
    " -> (Tensor dx, Tensor y)",
    _activation_pair,
    reference.activation_pair,
)
_define(
    "softmax_backward(Tensor grad, Tensor codes, Tensor scales, int bits, int? dither=None)"
    " -> Tensor",
    _softmax_backward,
    reference.softmax_backward,
)
_define(
    "scale_backward(Tensor grad, Tensor scale, ScalarType dtype)"
    " -> (Tensor scaled, Tensor cast, Tensor total)",
    _scale_backward,
    reference.scale_backward,
)
_define("bitmask_encode(Tensor mask) -> Tensor", _bitmask_encode, reference.bitmask_encode)
_define("bitmask_positive(Tensor x) -> Tensor", _bitmask_positive, reference.bitmask_positive)
_define(
    "bitmask_apply(Tensor grad, Tensor bits, float scale) -> Tensor",
    _bitmask_apply,
    reference.bitmask_apply,
)
_define("cast_like(Tensor x, Tensor like) -> Tensor", _cast_like, reference.cast_like)
