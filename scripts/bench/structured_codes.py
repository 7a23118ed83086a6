"""Codes without kernels: the operators of `Affine` as functions that round in float32.

A codec saves the rounded values themselves, so any code can be measured before a kernel exists.
`code_structure.py` measures the codes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs.affine import Affine, group_shape
from mesa_train.codecs.lossless import Lossless
from mesa_train.kernels.reference import ACTIVATIONS
from mesa_train.ops.norm import token_norm_gradients

# The role of a tensor that means every role.
ALL = "mesa4"
# The rows of a tensor from which a mean or deviation of channels is computed.
SAMPLED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to code. The defaults are the engine's affine codes.

    Attributes:
        mean: "image" or "batch": a mean for each channel is stored once and removed.
        deviation: each channel is divided by its standard deviation.
        rotation: a Hadamard transform of 128 or 64 neighbouring channels.
        lloyd: the levels of Lloyd and Max for a normal distribution, no scale and no zero.
        group: elements of a group; None for the preset's.
        scale_bits: bits of a scale and of a zero. With 8, the row has its largest magnitude too.
    """

    mean: str = ""
    deviation: bool = False
    rotation: bool = False
    lloyd: bool = False
    group: int | None = None
    scale_bits: int = 16

    def bits(self, codec: Affine, rows: int, cols: int, tokens: int) -> float:
        """Stored bits of an element of a (rows, cols) tensor."""
        vectors = {"image": rows // tokens, "batch": 1}.get(self.mean, 0) + self.deviation
        total = codec.bits + 16 * vectors / rows
        if self.lloyd:
            return total
        groups, _ = group_shape(cols, self.group or codec.group_size)
        return total + (2 * self.scale_bits * groups + 16 * (self.scale_bits == 8)) / cols


VARIANTS = {
    "affine, groups of 128": Variant(),
    "groups of 64": Variant(group=64),
    "groups of 32": Variant(group=32),
    "8-bit scales, groups of 64": Variant(group=64, scale_bits=8),
    "8-bit scales, groups of 32": Variant(group=32, scale_bits=8),
    "mean of each image": Variant(mean="image"),
    "mean of the batch": Variant(mean="batch"),
    "mean and deviation of channels": Variant(mean="batch", deviation=True),
    "rotation": Variant(rotation=True),
    "mean of the batch, rotation": Variant(mean="batch", rotation=True),
    "rotation, Lloyd-Max levels": Variant(rotation=True, lloyd=True),
}


@dataclasses.dataclass(frozen=True)
class Rounded(Affine):
    """A codec whose codes are the rounded values themselves, in float32."""

    variant: Variant = Variant()
    role: str = ""  # of the tensors that `variant` is for; the other tensors have affine codes
    tokens: int = 1
    used: tuple[list[float], ...] = ()

    def encode(self, x: Tensor) -> Any:
        return self._rounded(x, "linear" if self.stochastic else "activation")

    def encode_parts(self, x: Tensor, parts: int) -> list[Any]:
        return [self.encode(part) for part in x.chunk(parts, 1)]

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Any:
        centred = x.float() if mean is None else x.float() - mean.float()[:, None]
        return self._rounded(centred * rstd.float()[:, None], "x_hat")

    def decode(
        self,
        codes: Any,
        cols: int,  # noqa: ARG002
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        value = codes[0] if weight is None else codes[0] * weight.float()
        return (value if bias is None else value + bias.float()).to(dtype)

    def norm_backward(
        self, codes: Any, grad: Tensor, rstd: Tensor, weight: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return token_norm_gradients(grad.float(), codes[0], rstd.float(), weight, centred)

    def activation_decode(self, codes: Any, cols: int, dtype: torch.dtype, kind: str) -> Tensor:  # noqa: ARG002
        return ACTIVATIONS[kind][0](codes[0]).to(dtype)

    def activation_backward(self, codes: Any, grad: Tensor, kind: str) -> Tensor:
        return ACTIVATIONS[kind][1](grad.float().contiguous(), codes[0]).to(grad.dtype)

    def activation_pair(self, codes: Any, grad: Tensor, kind: str) -> Any:
        value = ACTIVATIONS[kind][0](codes[0]).to(grad.dtype)
        return self.activation_backward(codes, grad, kind), value

    def activation_pair_sum(self, codes: Any, grad: Tensor, kind: str) -> Any:
        dx, value = self.activation_pair(codes, grad, kind)
        return dx, value, dx.float().sum(0)

    def _rounded(self, x: Tensor, role: str) -> tuple[Tensor, Tensor]:
        chosen = role == self.role or self.role == ALL
        variant = self.variant if chosen and len(x) % self.tokens == 0 else Variant()
        if chosen:
            rows, cols = x.shape
            self.used[0].append(variant.bits(self, rows, cols, self.tokens) * x.numel())
            self.used[1].append(x.numel())
        return code(x.float(), self, variant, self.tokens), x.new_zeros(1)


def code(x: Tensor, codec: Affine, variant: Variant, tokens: int) -> Tensor:
    """(rows, cols) in float32, coded and decoded."""
    shift, factor = torch.zeros(()), torch.ones(())
    sample = x[:: max(1, len(x) // SAMPLED_ROWS)]
    if variant.mean == "image":
        of_image = x.view(-1, tokens, x.shape[1]).mean(1, keepdim=True).bfloat16().float()
        shift = of_image.expand(-1, tokens, -1).reshape(x.shape)
    elif variant.mean == "batch":
        shift = sample.mean(0, keepdim=True).bfloat16().float()
    if variant.deviation:
        factor = ((sample - shift).std(0, keepdim=True) + 1e-3 * sample.std()).bfloat16().float()
    value = (x - shift) / factor
    rotates = variant.rotation and x.shape[1] % 64 == 0
    if rotates:
        value = rotate(value)
    value = lloyd(value, codec.bits) if variant.lloyd else affine(value, codec, variant)
    if rotates:
        value = rotate(value)
    return value * factor + shift


def affine(x: Tensor, codec: Affine, variant: Variant) -> Tensor:
    """Affine codes of groups, with dither if the codec has it."""
    rows, cols = x.shape
    groups, size = group_shape(cols, variant.group or codec.group_size)
    columns = torch.arange(groups * size).clamp(max=cols - 1)
    grouped = x[:, columns].view(rows, groups, size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = 2**codec.bits - 1
    if variant.scale_bits == 8:
        most = x.abs().amax(1).view(rows, 1, 1).clamp(min=1e-30)
        zero = (torch.floor(low / most * 127) / 127) * most
        # Scales in steps of a sixteenth of an octave, below 2 * most.
        octaves = torch.floor(-16 * torch.log2(((high - zero) / (2.02 * most)).clamp(min=1e-9)))
        scale = 2.02 * most * 2 ** (-octaves.clamp(0, 255) / 16) / levels
    else:
        zero = _bfloat16(low, -1)
        scale = _bfloat16((high - zero) / levels, 1)
    steps = (grouped - zero) * torch.where(scale > 0, scale.reciprocal(), 0)
    if codec.dither:
        drawn = torch.rand_like(steps)
        codes = torch.floor(steps + drawn).clamp(0, levels) - drawn + 0.5
    else:
        codes = steps.round().clamp(0, levels)
    return (codes * scale + zero).view(rows, -1)[:, :cols]


def _bfloat16(x: Tensor, direction: int) -> Tensor:
    """x rounded to bfloat16, up for direction 1 and down for -1."""
    near = x.bfloat16().float()
    step = near.abs() * 2**-7
    return torch.where(
        (near - x) * direction < 0, (near + direction * step).bfloat16().float(), near
    )


def rotate(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of 128 neighbouring channels, or of 64."""
    size = 128 if x.shape[1] % 128 == 0 else 64
    value = x.reshape(len(x), -1, size)
    for half in (2**k for k in range(size.bit_length() - 1)):
        pairs = value.view(*value.shape[:2], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        value = torch.stack((first + second, first - second), -2).view(value.shape)
    return (value / math.sqrt(size)).reshape(x.shape)


def lloyd(x: Tensor, bits: int) -> Tensor:
    """x rounded to the levels with the least squared error for a normal distribution."""
    levels = _lloyd_levels(bits)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def _lloyd_levels(bits: int, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    """Lloyd's iteration on a fine grid (S. Lloyd, Least squares quantization in PCM, 1982)."""
    if bits not in cache:
        x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
        density = torch.exp(-(x**2) / 2)
        levels = torch.linspace(-3, 3, 2**bits, dtype=torch.float64)
        for _ in range(3000):
            cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
            mass = torch.zeros_like(levels).index_add_(0, cell, density)
            levels = torch.zeros_like(levels).index_add_(0, cell, density * x) / mass
        cache[bits] = levels.float()
    return cache[bits]


def rounded_codec(
    variant: Variant,
    role: str,
    tokens: int,
    used: tuple[list[float], ...],
    bits: int,
    group_size: int,
    rounding: str,
    running: bool,  # noqa: ARG001
) -> Any:
    """In place of `codecs.of`. Codecs of 8 and 32 bits stay as they are."""
    stochastic, dither = rounding != "nearest", rounding == "dither"
    if bits == 32:
        return Lossless()
    if bits == 8:
        return Affine(bits, group_size, stochastic, dither=dither)
    return Rounded(bits, group_size, stochastic, 0, dither, variant, role, tokens, used)
