"""The affine code written a second time, one number after another in numpy: slow and obvious.

It shares no line with `kernels/reference.py`; where both agree, the specification is understood.
"""

import math
import struct

import numpy as np

F = np.float32


def bits_of(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def float_of(bits: int) -> np.float32:
    return F(struct.unpack("<f", struct.pack("<I", bits))[0])


def bfloat16_down(x: np.float32) -> np.float32:
    """The largest finite bfloat16 that is not above x, else the lowest finite one."""
    candidate = float_of(bits_of(x) & 0xFFFF0000)
    if candidate > x:  # Negative: dropping digits moved it up.
        below = bits_of(candidate) + 0x10000
        return float_of(0xFF7F0000 if below == 0xFF800000 else below)
    return candidate


def bfloat16_up(x: np.float32) -> np.float32:
    """The smallest bfloat16 that is not below x >= 0."""
    return float_of((bits_of(x) + 0xFFFF) & 0xFFFF0000)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def grid(group: np.ndarray, bits: int) -> tuple[np.float32, np.float32]:
    levels = F(2**bits - 1)
    zero = bfloat16_down(min(group)) + F(0)
    spread = max(group) - zero
    scale = bfloat16_up(F(min(spread, np.finfo(F).max)) / levels)
    if not np.isfinite(levels * scale + zero):
        scale = float_of(bits_of(scale) - 0x10000)
    return (F(0) if scale < np.finfo(F).tiny else scale), zero


def encode(x: np.ndarray, bits: int, group_size: int, stochastic: bool, seed: int):
    """Quantised values (rows, cols) and the scales' bits (rows, groups, 2)."""
    rows, cols = x.shape
    groups = math.ceil(cols / group_size)
    size = math.ceil(cols / groups)
    q = np.zeros((rows, cols), np.int64)
    scales = np.zeros((rows, groups, 2), np.uint16)
    with np.errstate(all="ignore"):
        for r in range(rows):
            for g in range(groups):
                group = x[r, g * size : (g + 1) * size].astype(F)
                if not np.isfinite(group).all():
                    scales[r, g] = 0x7FC0
                    continue
                scale, zero = grid(group, bits)
                pair = bits_of(scale) >> 16, bits_of(zero) >> 16
                scales[r, g] = pair
                inverse = F(1) / scale if scale > 0 else F(0)
                key = mix((pair[0] | pair[1] << 16) ^ mix((r * groups + g) ^ seed))
                for i, value in enumerate(group):
                    v = (value - zero) * inverse
                    if stochastic:
                        v = min(max(np.rint(v * F(2 ** (16 - bits))), 0), 65535)
                        drawn = (mix(i) // 2**16 * (key % 2**16 | 1) + key // 2**16) % 2**16
                        v = min(int(v) + drawn // 2**bits, 65535) // 2 ** (16 - bits)
                    else:
                        v = np.rint(v)
                    q[r, g * size + i] = int(min(max(v, 0), 2**bits - 1))
    return q, scales


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, bytes): the plane of the low bits, then, at 3, 5 and 6 bits, that of the rest."""
    low = {3: 2, 5: 4, 6: 4}.get(bits, bits)
    rows, cols = q.shape
    planes = [np.zeros((rows, math.ceil(cols * b / 8)), np.uint8) for b in (low, bits - low)]
    for r in range(rows):
        for i in range(cols):
            planes[0][r, i * low // 8] |= q[r, i] % 2**low << (i * low % 8)
            if bits > low:
                at = i * (bits - low)
                planes[1][r, at // 8] |= q[r, i] // 2**low << (at % 8)
    return np.concatenate(planes, 1)


def decode_dithered(q: np.ndarray, scales: np.ndarray, bits: int, seed: int) -> np.ndarray:
    rows, cols = q.shape
    groups = scales.shape[1]
    size = math.ceil(cols / groups)
    out = np.zeros((rows, cols), F)
    places = 16 - bits
    for r in range(rows):
        for i in range(cols):
            g = i // size
            low, high = (int(b) for b in scales[r, g])
            key = mix((low | high << 16) ^ mix((r * groups + g) ^ seed))
            drawn = (mix(i % size) // 2**16 * (key % 2**16 | 1) + key // 2**16) % 2**16
            if float_of(low << 16) >= F(2.0**96) or low >= 0x7F80:
                drawn = 2**15
            step = int(q[r, i]) - drawn // 2**bits / 2**places + (2**places - 1) / 2 / 2**places
            out[r, i] = F(step) * float_of(low << 16) + float_of(high << 16)
    return out


def decode(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows, cols = q.shape
    groups = scales.shape[1]
    size = math.ceil(cols / groups)
    out = np.zeros((rows, cols), F)
    for r in range(rows):
        for i in range(cols):
            scale, zero = (float_of(int(b) << 16) for b in scales[r, i // size])
            out[r, i] = F(q[r, i]) * scale + zero
    return out
