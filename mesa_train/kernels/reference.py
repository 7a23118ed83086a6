"""The reference of every operator in plain torch. It specifies the mathematics.

It runs on any device. The native kernels must equal it code for code. It runs wherever there is no
native kernel. Cost: many passes and many temporaries, about ten times the time of a copy. Nothing
here is tuned.

The code of one group, all in float32 (a float64 input is cast first):

    zero  = min rounded down to bfloat16                      (-0.0 is stored as 0.0)
    scale = (max - zero) / (2**bits - 1) rounded up to bfloat16
    q     = rint(v), or floor(v' + u) when stochastic, with v = (x - zero) * (1 / scale)
    value = q * scale + zero                                  (two roundings, never an FMA)

So the grid covers [min, max], and |value - x| is at most scale / 2, or at most scale if stochastic.

Special cases:

- A NaN or infinity in a group makes scale and zero NaN, and the codes of the group 0. The whole
  group decodes to NaN, so a GradScaler sees it.
- A scale under the smallest normal float32 becomes 0, and the group decodes to its zero. So the
  inverse never overflows, and a device that flushes denormals gives the same codes.
- Every finite group decodes to finite values. zero is at least the lowest bfloat16. A range wider
  than float32 is cut to the largest float32. If the top of the grid would overflow, scale is one
  bfloat16 step smaller. Values outside such a grid saturate.

Stochastic rounding rounds v to v' with 16 - bits binary places. It draws u, with as many places,
from a hash. The hash depends on the group's grid, the group's index, the seed and the element's
position in the group. So a recompute draws the same numbers, no generator is used, and nothing
needs to be saved. All values fit into 16 bits, and a processor handles twice as many 16-bit values
at once as floats.

Subtractive dither has the codes of stochastic rounding. The decoder draws u again and subtracts it:

    value = (q - u + mean(u)) * scale + zero

The error is at most about scale / 2 and has the same distribution for every x. So its expectation
is 0, as for stochastic rounding, and its variance is half as large on average. The values lie up to
half a step outside [min, max]. The decoder takes u as mean(u) in a group whose scale is 2**96 or
more, so every finite group decodes to finite values.

Codes of 6, 5 and 3 bits are stored in two planes. A row has the plane of the low 4, 4 or 2 bits
first, then the plane of the high 2, 1 or 1 bits. Each plane begins on a whole byte.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import code_bytes, pack, unpack

_BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_BFLOAT16_NAN = 0x7FC0
_UINT32 = 0xFFFFFFFF


# --- groups ---


def _group_size(cols: int, groups: int) -> int:
    """Length of the balanced groups of a row. The last group may be shorter."""
    return -(-cols // max(groups, 1))


# --- the grid of a group ---


def _bfloat16_bits_down(x: Tensor) -> Tensor:
    """The float32 bits of x, rounded towards -inf to a bfloat16 value."""
    bits = x.view(torch.int32)
    cut = bits & ~0xFFFF
    return torch.where((bits < 0) & (bits != cut), cut + 0x10000, cut)


def _grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero (float32, (rows, groups)) of (rows, groups, size).

    Also returns which groups are finite.
    """
    # A tensor, not a number: CUDA divides by a number through its reciprocal, which rounds twice.
    levels = groups.new_full((), 2**bits - 1)
    finite = groups.isfinite().all(-1)
    low, high = groups.amin(-1), groups.amax(-1)
    zero = _bfloat16_bits_down(low).view(torch.float32).clamp(min=-_BFLOAT16_MAX)
    zero = torch.where(zero == 0, 0.0, zero)
    step = ((high - zero).clamp(max=_FLOAT32_MAX) / levels).view(torch.int32)
    up = (step + 0xFFFF) & ~0xFFFF
    overflows = ~(levels * up.view(torch.float32) + zero).isfinite()
    scale = torch.where(overflows, up - 0x10000, up).view(torch.float32)
    return torch.where(scale < _FLOAT32_TINY, 0.0, scale), zero, finite


# --- stochastic rounding ---


def _mix(x: Tensor) -> Tensor:
    """The lowbias32 hash of uint32 values stored in int64.

    https://nullprogram.com/blog/2018/07/31/
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    # 0x846CA68B minus 2**32: the low 32 bits are the same, and the product fits into int64.
    x = (x * (0x846CA68B - 2**32)) & _UINT32
    return x ^ (x >> 16)


def draws(scale_bits: Tensor, zero_bits: Tensor, size: int, seed: int) -> Tensor:
    """16 drawn bits for each element, int64 (rows, groups, size).

    The element's position in its group is hashed. Its hash is multiplied by one half of a hash of
    the group, and the other half is added. Elements of a group are pairwise uncorrelated, and
    groups are independent.

    Args:
        scale_bits: the bits of the group's scale, int64 (rows, groups).
        zero_bits: the bits of the group's zero, int64 (rows, groups).
        size: elements of a group.
        seed: of which the low 32 bits are used.
    Returns:
        The drawn bits.
    """
    rows, groups = scale_bits.shape
    device = scale_bits.device
    index = torch.arange(rows * groups, device=device).view(rows, groups) & _UINT32
    key = _mix((scale_bits | (zero_bits << 16)) ^ _mix(index ^ (seed & _UINT32))).unsqueeze(-1)
    element = _mix(torch.arange(size, device=device)) >> 16
    return (element * (key & 0xFFFF | 1) + (key >> 16)) & 0xFFFF


# --- operators ---


def affine_encode(
    x: Tensor, bits: int, group_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """(rows, cols) to codes (rows, bytes) uint8 and scales (rows, groups, 2) bfloat16."""
    rows, cols = x.shape
    groups = -(-cols // group_size)
    size = _group_size(cols, groups)
    if x.numel() == 0:
        codes = x.new_empty((rows, code_bytes(cols, bits)), dtype=torch.uint8)
        return codes, x.new_empty((rows, groups, 2), dtype=torch.bfloat16)
    # The last group is padded with copies of the last column. These copies change neither minimum
    # nor maximum.
    columns = torch.arange(groups * size, device=x.device).clamp(max=cols - 1)
    grouped = x.to(torch.float32)[:, columns].view(rows, groups, size)

    scale, zero, finite = _grid(grouped, bits)
    bits16 = (torch.stack((scale, zero), -1).view(torch.int32) >> 16).to(torch.int64) & 0xFFFF
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    v = (grouped - zero.unsqueeze(-1)) * inverse.unsqueeze(-1)
    v = torch.where(finite.unsqueeze(-1), v, 0.0)
    if stochastic:
        fixed = (v * 2 ** (16 - bits)).round().clamp(0, 0xFFFF).to(torch.int64)
        drawn = draws(bits16[..., 0], bits16[..., 1], size, seed) >> bits
        q = (fixed + drawn).clamp(max=0xFFFF) >> (16 - bits)
    else:
        q = v.round().clamp(0, 2**bits - 1)
    codes = pack(q.view(rows, groups * size)[:, :cols], bits)
    bits16 = torch.where(finite.unsqueeze(-1), bits16, _BFLOAT16_NAN)
    return codes, bits16.to(torch.int16).view(torch.bfloat16)


def affine_encode_parts(
    x: Tensor, parts: int, bits: int, group_size: int, stochastic: bool, seed: int
) -> list[Tensor]:
    """Codes and scales, alternating, of each of `parts` equal parts of the columns of x."""
    cols = x.shape[1] // parts
    coded = [
        affine_encode(x[:, k * cols : (k + 1) * cols], bits, group_size, stochastic, seed)
        for k in range(parts)
    ]
    return [tensor for pair in coded for tensor in pair]


# The scale from which a group is decoded without its draws, as the bits of a bfloat16: 2**96.
UNDITHERED = 0x6F80


def _decode(
    codes: Tensor, scales: Tensor, bits: int, cols: int, dither: int | None = None
) -> Tensor:
    """The decoded values (rows, cols) in float32. `dither`: the seed of the draws to subtract."""
    size = _group_size(cols, scales.shape[1])
    group = torch.arange(cols, device=codes.device) // max(size, 1)
    scale, zero = scales.to(torch.float32)[:, group].unbind(-1)
    q = unpack(codes, bits, cols)
    if dither is None:
        return q.to(torch.float32) * scale + zero
    bits16 = scales.view(torch.int16).to(torch.int64) & 0xFFFF
    drawn = draws(bits16[..., 0], bits16[..., 1], size, dither)
    drawn = torch.where(bits16[..., :1] >= UNDITHERED, 0x8000, drawn).flatten(1)[:, :cols]
    # All of this is exact in float32.
    point = 16 - bits
    middle = (2**point - 1) / 2
    shifted = ((q << point) - (drawn >> bits)).to(torch.float32) + middle
    return shifted * 2.0**-point * scale + zero


def affine_decode(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    cols: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dither: int | None = None,
) -> Tensor:
    """Values (rows, cols), times weight (cols,) plus bias (cols,), in `dtype`."""
    value = _decode(codes, scales, bits, cols, dither)
    if weight is not None:
        value = value * weight.to(torch.float32)
    if bias is not None:
        value = value + bias.to(torch.float32)
    return value.to(dtype)


def normalized_encode(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    bits: int,
    group_size: int,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Codes of (x - mean) * rstd, with one mean and one rstd per row.

    If mean is None, x is not centred.
    """
    value = x.to(torch.float32)
    if mean is not None:
        value = value - mean.to(torch.float32).unsqueeze(1)
    value = value * rstd.to(torch.float32).unsqueeze(1)
    return affine_encode(value, bits, group_size, stochastic, seed)


def norm_backward(
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
    """dx, dweight and dbias of LayerNorm (centered) or RMSNorm from the decoded x_hat."""
    grad = grad.to(torch.float32)
    xhat = _decode(codes, scales, bits, grad.shape[1], dither)
    dxhat = grad if weight is None else grad * weight.to(torch.float32)
    dx = dxhat - xhat * (dxhat * xhat).mean(1, keepdim=True)
    if centered:
        dx = dx - dxhat.mean(1, keepdim=True)
    dx = dx * rstd.to(torch.float32).unsqueeze(1)
    return dx.to(dtype).contiguous(), (grad * xhat).sum(0), grad.sum(0)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


_aten = torch.ops.aten
_Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]

# kind: (kind(x), grad * kind'(x)), with torch's default parameters.
ACTIVATIONS: dict[str, _Pair] = {
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    ),
    "silu": (F.silu, _aten.silu_backward),
    "relu": (F.relu, lambda g, x: _aten.threshold_backward(g, x, 0)),
    "hardswish": (F.hardswish, _aten.hardswish_backward),
    "hardsigmoid": (F.hardsigmoid, _aten.hardsigmoid_backward),
    "mish": (F.mish, _aten.mish_backward),
    "softplus": (F.softplus, lambda g, x: _aten.softplus_backward(g, x, 1, 20)),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
    "elu": (F.elu, lambda g, x: _aten.elu_backward(g, 1, 1, 1, False, x)),
    "leaky_relu": (F.leaky_relu, lambda g, x: _aten.leaky_relu_backward(g, x, 0.01, False)),
}


def activation_decode(
    codes: Tensor, scales: Tensor, bits: int, cols: int, dtype: torch.dtype, kind: str
) -> Tensor:
    """kind(decoded), (rows, cols) in `dtype`."""
    return ACTIVATIONS[kind][0](_decode(codes, scales, bits, cols)).to(dtype)


def activation_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> Tensor:
    """grad * kind'(decoded), (rows, cols) in grad's dtype."""
    x = _decode(codes, scales, bits, grad.shape[1])
    return ACTIVATIONS[kind][1](grad.to(torch.float32).contiguous(), x).to(grad.dtype)


def activation_pair(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor]:
    """grad * kind'(decoded) and kind(decoded), both (rows, cols) in grad's dtype."""
    value = activation_decode(codes, scales, bits, grad.shape[1], grad.dtype, kind)
    return activation_backward(grad, codes, scales, bits, kind), value


def softmax_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, bits: int, dither: int | None = None
) -> Tensor:
    """y * (grad - sum(grad * y)) in grad's dtype.

    y is the decoded output of a softmax along each row.
    """
    wide = grad.to(torch.float32)
    y = _decode(codes, scales, bits, grad.shape[1], dither)
    return (y * (wide - (wide * y).sum(1, keepdim=True))).to(grad.dtype)


def scale_backward(
    grad: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """grad * scale and grad, both in `dtype`, and grad's column sums in float32.

    The backward of a Linear with a layer scale (cols,) behind it needs these three of the gradient
    (rows, cols).
    """
    wide = grad.to(torch.float32)
    scaled = (wide * scale.to(torch.float32)).to(dtype).contiguous()
    return scaled, torch.empty_like(scaled).copy_(wide), wide.sum(0)


def bitmask_encode(mask: Tensor) -> Tensor:
    """Bool of any shape to uint8 (ceil(numel / 8),), row-major, low bit first."""
    return pack(mask.reshape(1, -1), 1).view(-1)


def bitmask_positive(x: Tensor) -> Tensor:
    """Bits of x > 0. A NaN counts as positive, as in the derivative of PyTorch's relu."""
    return bitmask_encode(~(x <= 0))


def bitmask_apply(grad: Tensor, bits: Tensor, scale: float) -> Tensor:
    """grad * scale if the bit is set, else 0. Strides follow grad. Float64 stays float64."""
    mask = unpack(bits.view(1, -1), 1, grad.numel()).view(grad.shape).bool()
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return torch.empty_like(grad).copy_(torch.where(mask, wide * scale, 0.0))


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`, which must differ from its own."""
    return x.to(like.dtype)
