"""Affine codes: 2 to 6 or 8 bits per element, and four bytes (scale, zero) per group.

A tensor is viewed as (rows, cols), and a group never crosses a row. `kernels/reference.py`
specifies the code.

Cost: bits / 8 bytes an element, and 4 bytes a group. In groups of 64, an element takes 1.06 bytes at
8 bits, 0.81 at 6, 0.69 at 5, 0.56 at 4, 0.44 at 3, and 0.31 at 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mesa_train import kernels
from mesa_train.kernels.packing import code_bytes
from mesa_train.kernels.reference import ACTIVATIONS

Codes = tuple[Tensor, Tensor]

_ops = torch.ops.mesa_train


def group_shape(cols: int, group_size: int) -> tuple[int, int]:
    """(groups, size) of a row: balanced groups of at most `group_size`.

    The last group may be shorter.
    """
    groups = (cols + group_size - 1) // group_size
    return groups, (cols + groups - 1) // groups if groups else 0


@dataclass(frozen=True)
class Affine:
    """How to code a tensor. The methods are pure functions of the codec and the data.

    Args:
        bits: 8, 6, 5, 4, 3 or 2; default 8.
        group_size: the largest number of elements that share a scale and a zero; at least 1,
            default 64.
        stochastic: True for unbiased rounding (error up to scale), False (default) for nearest
            (error up to scale / 2).
        seed: seed of stochastic rounding, of which the low 32 bits are used; default 0. The same
            data and seed give the same codes.
        dither: True for subtractive dither. The codes are those of stochastic rounding, and
            decoding draws the same numbers again and subtracts them. So the result is unbiased, and
            its variance is half as large. Needs `stochastic`; default False.
    Raises:
        ValueError: `bits` is not one of the choices, `group_size` is below 1, or `dither` is True
            without `stochastic`.
    """

    bits: int = 8
    group_size: int = 64
    stochastic: bool = False
    seed: int = 0
    dither: bool = False

    def __post_init__(self) -> None:
        choices = kernels.schemas.BITS
        if not isinstance(self.bits, int) or self.bits not in choices:
            raise ValueError(f"bits must be one of {choices}, got {self.bits!r}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size!r}")
        if self.dither and not self.stochastic:
            raise ValueError("dither=True needs stochastic=True, got stochastic=False")

    def __str__(self) -> str:
        rounding = "stochastic" if self.stochastic else "nearest"
        rounding = "dither" if self.dither else rounding
        return f"{self.bits} bits in groups of {self.group_size}, {rounding}"

    def encode(self, x: Tensor) -> Codes:
        """The codes (rows, bytes) and scales (rows, groups, 2) of (rows, cols) of any float
        dtype."""
        kernels.load()
        return _ops.affine_encode.default(x, *self._code())

    def encode_parts(self, x: Tensor, parts: int) -> list[Codes]:
        """`encode` of each of `parts` equal parts of the columns, in one pass."""
        kernels.load()
        tensors = _ops.affine_encode_parts.default(x, parts, *self._code())
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Codes:
        """Codes of (x - mean) * rstd, with mean and rstd (rows,).

        If mean is None, x is not centred.
        """
        kernels.load()
        return _ops.normalized_encode.default(x, mean, rstd, *self._code())

    def norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Codes]:
        """LayerNorm or RMSNorm of (rows, cols), and the codes of the normalised rows, in one pass.

        Args:
            x: (rows, cols).
            weight: (cols,) or None.
            bias: (cols,) or None.
            eps: added to the variance.
            centred: True for LayerNorm, False for RMSNorm.
            dtype: the dtype of the output.
        Returns:
            The output (rows, cols), rstd (rows,), and the codes.
        """
        kernels.load()
        y, rstd, *codes = _ops.norm_encode.default(
            x, weight, bias, eps, centred, dtype, *self._code()
        )
        return y, rstd, (codes[0], codes[1])

    def activation(self, x: Tensor, kind: str) -> tuple[Tensor, Codes]:
        """The activation `kind` of (rows, cols), and the codes of x, in one pass."""
        kernels.load()
        y, *codes = _ops.activation_encode.default(x, kind, *self._code())
        return y, (codes[0], codes[1])

    def softmax(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Codes]:
        """Softmax along the rows in `dtype`, and the codes of the output, in one pass."""
        kernels.load()
        y, *codes = _ops.softmax_encode.default(x, dtype, *self._code())
        return y, (codes[0], codes[1])

    def softmax_backward(self, codes: Codes, grad: Tensor) -> Tensor:
        """The gradient (rows, cols) of a softmax's input, from codes of its output."""
        kernels.load()
        return _ops.softmax_backward.default(grad, *codes, self.bits, self._seed_of_dither())

    def decode(
        self,
        codes: Codes,
        cols: int,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The decoded (rows, cols) in `dtype`, times weight (cols,) plus bias (cols,)."""
        kernels.load()
        dither = self._seed_of_dither()
        return _ops.affine_decode.default(*codes, self.bits, cols, dtype, weight, bias, dither)

    def norm_backward(
        self, codes: Codes, grad: Tensor, rstd: Tensor, weight: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx (in grad's dtype), dweight and dbias of a norm, from codes of its normalised input."""
        kernels.load()
        dither = self._seed_of_dither()
        return _ops.norm_backward.default(
            grad, *codes, rstd, weight, self.bits, centred, grad.dtype, dither
        )

    def activation_decode(self, codes: Codes, cols: int, dtype: torch.dtype, kind: str) -> Tensor:
        """The activation `kind` of the decoded tensor, (rows, cols) in `dtype`."""
        kernels.load()
        if self.dither:
            x = self.decode(codes, cols, torch.float32)
            return ACTIVATIONS[kind][0](x).to(dtype)
        return _ops.activation_decode.default(*codes, self.bits, cols, dtype, kind)

    def activation_backward(self, codes: Codes, grad: Tensor, kind: str) -> Tensor:
        """grad (rows, cols) times the derivative of `kind` at the decoded tensor."""
        kernels.load()
        if self.dither:
            x = self.decode(codes, grad.shape[1], torch.float32)
            return ACTIVATIONS[kind][1](grad.float().contiguous(), x).to(grad.dtype)
        return _ops.activation_backward.default(grad, *codes, self.bits, kind)

    def activation_pair(self, codes: Codes, grad: Tensor, kind: str) -> Codes:
        """`activation_backward`, and the activation itself in grad's dtype, in one pass."""
        kernels.load()
        if self.dither:
            value = self.activation_decode(codes, grad.shape[1], grad.dtype, kind)
            return self.activation_backward(codes, grad, kind), value
        return _ops.activation_pair.default(grad, *codes, self.bits, kind)

    def activation_pair_sum(
        self, codes: Codes, grad: Tensor, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`activation_pair`, and the sum of its first result over the rows in float32."""
        kernels.load()
        if self.dither:
            dx, value = self.activation_pair(codes, grad, kind)
            return dx, value, dx.float().sum(0)
        return _ops.activation_pair_sum.default(grad, *codes, self.bits, kind)

    def _seed_of_dither(self) -> int | None:
        """The argument `dither` of a decoding operator."""
        return self.seed if self.dither else None

    def _code(self) -> tuple[int, int, bool, int]:
        """The arguments of an encoding operator."""
        return self.bits, self.group_size, self.stochastic, self.seed

    def shapes(
        self,
        rows: int,
        cols: int,
        normalized_from: torch.dtype | None = None,  # noqa: ARG002
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the codes of a (rows, cols) tensor."""
        groups, _ = group_shape(cols, self.group_size)
        codes = (rows, code_bytes(cols, self.bits))
        return [(codes, torch.uint8), ((rows, groups, 2), torch.bfloat16)]

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of the codes and scales of a (rows, cols) tensor."""
        groups, _ = group_shape(cols, self.group_size)
        return rows * (code_bytes(cols, self.bits) + 4 * groups)
