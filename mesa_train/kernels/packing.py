"""How codes are stored in bytes: planes of bits (`reference.py`)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def planes(bits: int) -> tuple[int, ...]:
    """The bits of each plane of a code, low bits first: powers of two with `bits` as their sum."""
    return tuple(plane for plane in (8, 4, 2, 1) if bits & plane)


def code_bytes(cols: int, bits: int) -> int:
    """Bytes of the codes of a row. `cols` may be symbolic."""
    return sum((cols * plane + 7) // 8 for plane in planes(bits))


def pack(values: Tensor, bits: int) -> Tensor:
    """(rows, cols) integers below 2**bits to (rows, bytes) uint8, low bits first."""
    packed, first = [], 0
    for plane in planes(bits):
        packed.append(_pack_plane((values.to(torch.int32) >> first) & (2**plane - 1), plane))
        first += plane
    return packed[0] if len(packed) == 1 else torch.cat(packed, 1)


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    """(rows, cols) integers below 2**bits to (rows, bytes) uint8, for bits that divide 8."""
    rows, cols = values.shape
    per_byte = 8 // bits
    width = -(-cols // per_byte)
    padded = F.pad(values, (0, width * per_byte - cols))
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=values.device)
    return (padded.view(rows, width, per_byte) << shifts).sum(-1).to(torch.uint8)


def unpack(codes: Tensor, bits: int, cols: int) -> Tensor:
    """(rows, bytes) uint8 to (rows, cols) int32."""
    values, first, begin = None, 0, 0
    for plane in planes(bits):
        end = begin + (cols * plane + 7) // 8
        part = _unpack_plane(codes[:, begin:end], plane, cols)
        values = part if values is None else values | (part << first)
        first, begin = first + plane, end
    assert values is not None
    return values


def _unpack_plane(codes: Tensor, bits: int, cols: int) -> Tensor:
    """`unpack` for bits that divide 8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device)
    values = (codes.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(1)[:, :cols]
