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

# Roles that mean more than one role: every role, and those of x_hat and of GELU's input.
ALL, PAIR = "mesa4", "pair"
# The rows of a tensor from which a mean or deviation of channels is computed.
SAMPLED_ROWS = 64
# With fewer rows an image, its mean would take more than a bit of an element. It is not removed.
FEWEST_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to code. The defaults are the engine's affine codes.

    Attributes:
        mean: "image" or "batch": a mean for each channel is stored once and removed. Any offset is
            valid, because the decoder adds the same offset.
        rows: the mean of an image is that of so many of its rows, evenly spaced; None for all.
        deviation: each channel is divided by its standard deviation.
        rotation: a Hadamard transform of 128 or 64 neighbouring channels.
        levels: "affine"; "normal": the levels of Lloyd and Max for a normal distribution of variance
            1, no scale and no zero; "group": the same levels for the mean and the deviation of a
            group, which are stored in place of zero and scale.
        group: elements of a group; None for the preset's.
        scale_bits: bits of a scale and of a zero. With 8, the row has its largest magnitude too.
        width: bits of a code; None for the preset's.
    """

    mean: str = ""
    rows: int | None = None
    deviation: bool = False
    rotation: bool = False
    levels: str = "affine"
    group: int | None = None
    scale_bits: int = 16
    width: int | None = None

    def bits(self, codec: Affine, rows: int, cols: int, images: int) -> float:
        """Stored bits of an element of a (rows, cols) tensor of so many images."""
        vectors = {"image": images, "batch": 1}.get(self.mean, 0) + self.deviation
        total = (self.width or codec.bits) + 16 * vectors / rows
        if self.levels == "normal":
            return total
        groups, _ = group_shape(cols, self.group or codec.group_size)
        return total + (2 * self.scale_bits * groups + 16 * (self.scale_bits == 8)) / cols


AFFINE = "affine, groups of 128"
VARIANTS = {
    AFFINE: Variant(),
    "groups of 64": Variant(group=64),
    "groups of 32": Variant(group=32),
    "8-bit scales, groups of 64": Variant(group=64, scale_bits=8),
    "8-bit scales, groups of 32": Variant(group=32, scale_bits=8),
    "mean of each image": Variant(mean="image"),
    "mean of 32 rows of each image": Variant(mean="image", rows=32),
    "mean of 16 rows of each image": Variant(mean="image", rows=16),
    "mean of 32 rows, 8-bit scales, groups of 64": Variant("image", 32, group=64, scale_bits=8),
    "mean of the batch": Variant(mean="batch"),
    "mean and deviation of channels": Variant(mean="batch", deviation=True),
    "rotation": Variant(rotation=True),
    "mean of the batch, rotation": Variant(mean="batch", rotation=True),
    "Lloyd-Max levels": Variant(levels="normal"),
    "rotation, Lloyd-Max levels": Variant(rotation=True, levels="normal"),
    "3 bits, affine": Variant(width=3),
    "3 bits, Lloyd-Max levels of a group": Variant(width=3, levels="group"),
    "2 bits, affine": Variant(width=2),
    "2 bits, Lloyd-Max levels of a group": Variant(width=2, levels="group"),
}


@dataclasses.dataclass(frozen=True)
class Rounded(Affine):
    """A codec whose codes are the rounded values themselves, in float32."""

    variant: Variant = Variant()
    role: str = ""  # of the tensors that `variant` is for; the other tensors have affine codes
    images: int = 1
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
        chosen = self.role in (role, ALL) or (self.role == PAIR and role != "linear")
        variant = self.variant if chosen else Variant()
        if variant.mean == "image" and not self._has_rows(x):
            variant = dataclasses.replace(variant, mean="")
        if chosen or self.role == PAIR:
            rows, cols = x.shape
            self.used[0].append(variant.bits(self, rows, cols, self.images) * x.numel())
            self.used[1].append(x.numel())
        return code(x.float(), self, variant, self.images), x.new_zeros(1)

    def _has_rows(self, x: Tensor) -> bool:
        """True if x has enough rows of every image."""
        return len(x) % self.images == 0 and len(x) >= FEWEST_ROWS * self.images


def code(x: Tensor, codec: Affine, variant: Variant, images: int) -> Tensor:
    """(rows, cols) in float32, coded and decoded. An image has rows / images consecutive rows."""
    shift, factor = torch.zeros(()), torch.ones(())
    sample = x[:: max(1, len(x) // SAMPLED_ROWS)]
    if variant.mean == "image":
        shift = image_means(x, images, variant.rows).bfloat16().float()
        shift = shift.repeat_interleave(len(x) // images, 0)
    elif variant.mean == "batch":
        shift = sample.mean(0, keepdim=True).bfloat16().float()
    if variant.deviation:
        factor = ((sample - shift).std(0, keepdim=True) + 1e-3 * sample.std()).bfloat16().float()
    value = (x - shift) / factor
    rotates = variant.rotation and x.shape[1] % 64 == 0
    if rotates:
        value = rotate(value)
    bits = variant.width or codec.bits
    if variant.levels == "normal":
        value = lloyd(value, bits)
    elif variant.levels == "group":
        value = lloyd_of_groups(value, bits, variant.group or codec.group_size)
    else:
        value = affine(value, bits, codec, variant)
    if rotates:
        value = rotate(value)
    return value * factor + shift


def image_means(x: Tensor, images: int, rows: int | None = None) -> Tensor:
    """(images, cols): the mean of each image's rows, or of `rows` evenly spaced ones of them."""
    of_image = x.view(images, -1, x.shape[1])
    if rows is not None and rows < of_image.shape[1]:
        chosen = torch.arange(rows) * of_image.shape[1] // rows
        of_image = of_image[:, chosen]
    return of_image.mean(1)


def affine(x: Tensor, bits: int, codec: Affine, variant: Variant) -> Tensor:
    """Affine codes of groups, with dither if the codec has it."""
    rows, cols = x.shape
    grouped = _grouped(x, variant.group or codec.group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = 2**bits - 1
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


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """(rows, groups, size). The last column fills the last group."""
    groups, size = group_shape(x.shape[1], group_size)
    columns = torch.arange(groups * size).clamp(max=x.shape[1] - 1)
    return x[:, columns].view(len(x), groups, size)


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


def lloyd_of_groups(x: Tensor, bits: int, group_size: int) -> Tensor:
    """`lloyd` of each group, relative to the group's mean and deviation in bfloat16."""
    grouped = _grouped(x, group_size)
    mean = grouped.mean(-1, keepdim=True).bfloat16().float()
    deviation = grouped.std(-1, keepdim=True).bfloat16().float().clamp(min=1e-30)
    value = lloyd((grouped - mean) / deviation, bits) * deviation + mean
    return value.view(len(x), -1)[:, : x.shape[1]]


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
    images: int,
    used: tuple[list[float], ...],
    bits: int,
    group_size: int,
    rounding: str,
    running: bool,  # noqa: ARG001
) -> Any:
    """In place of `codecs.of`. Codes of 8 bits are affine in every variant."""
    stochastic, dither = rounding != "nearest", rounding == "dither"
    if bits == 32:
        return Lossless()
    if bits == 8:
        variant = Variant()
    return Rounded(bits, group_size, stochastic, 0, dither, variant, role, images, used)
