"""Running ranges, the scheme of Mesa's paper (arXiv 2111.11124, section 3).

8 bits and stochastic rounding. A group is a head's channels over the whole batch. Minimum and range
are running averages with decay 0.9. This codec exists for comparison with the paper, and is written
in plain torch.

Differences from the authors' code:

- Codes saturate at both ends.
- A leaf stores the range that it was coded with, so a later forward cannot corrupt the leaf.
- The averages change once per optimizer step, never in a recompute.

The averages belong to the wrapped module's context, and they are not buffers. So `to_empty`, `half`
and `state_dict` do not change or contain them, and they move to the device of the coded tensors.
The ranges are the tensor's own under `compress`, which has no module, and while torch.compile
traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mesa_train.kernels.reference import draws

from .affine import group_shape

DECAY = 0.9
_LEVELS = 255


class Running:
    """The codec of one operand with running ranges.

    Args:
        ranges: the ranges by operand. `ranges[name]` is (3, groups): minimum, range, and the step
            of the last update. None: no averages are stored.
        name: the operand's key in `ranges`.
        step: the number of the optimizer step.
        group_size: elements that share one range.
    """

    def __init__(
        self, ranges: dict[str, Tensor] | None, name: str, step: int, group_size: int
    ) -> None:
        self.ranges, self.name, self.step, self.group_size = ranges, name, step, group_size

    def __str__(self) -> str:
        return "8 bits, running ranges"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes (rows, cols) of (rows, cols), with the minimum and scale of each group.

        The minimum and the scale are float32 (groups,).
        """
        x = x.float()
        cols = x.shape[1]
        groups, size = group_shape(cols, self.group_size)
        low, span = self._range(x, groups, size)
        scale = span / _LEVELS
        zeros, scales = [t.repeat_interleave(size)[:cols] for t in (low, scale)]
        value = torch.where(scales > 0, (x - zeros) / scales, 0)
        codes = (value + _noise(x, groups, size)).floor_().clamp_(0, _LEVELS)
        scale = torch.where(x.isfinite().all(), scale, torch.nan)
        return codes.nan_to_num_(0).to(torch.uint8), low, scale

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:
        """Codes of (x - mean) * rstd, with mean and rstd (rows,)."""
        centred = x.float() if mean is None else x.float() - mean[:, None]
        return self.encode(centred * rstd[:, None])

    def shapes(
        self,
        rows: int,
        cols: int,
        normalized_from: torch.dtype | None = None,  # noqa: ARG002
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the codes of a (rows, cols) tensor."""
        groups, _ = group_shape(cols, self.group_size)
        ranges = ((groups,), torch.float32)
        return [((rows, cols), torch.uint8), ranges, ranges]

    def decode(
        self,
        tensors: Sequence[Tensor],
        cols: int,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The decoded (rows, cols) in `dtype`, times weight (cols,) plus bias (cols,)."""
        codes, low, scale = tensors
        _, size = group_shape(cols, self.group_size)
        zeros, scales = [t.repeat_interleave(size)[:cols] for t in (low, scale)]
        value = codes * scales + zeros
        if weight is not None:
            value = value * weight
        if bias is not None:
            value = value + bias
        return value.to(dtype)

    def _range(self, x: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
        """(minimum, range) to code with, (groups,) each.

        Updates the averages if this step has not updated them yet.
        """
        rows, cols = x.shape
        if rows == 0:
            return x.new_zeros(groups), x.new_zeros(groups)
        edge = x[:, -1:].expand(rows, groups * size - cols)
        pooled = torch.cat([x, edge], 1).view(rows, groups, size)
        low = pooled.amin((0, 2))
        span = pooled.amax((0, 2)) - low
        if (
            self.ranges is None
            or torch.compiler.is_compiling()
            or x.is_meta
            or type(x) is not Tensor
        ):
            # A fake tensor has no values to store.
            return low, span
        state = self.ranges.get(self.name)
        if state is not None:
            state = state.to(x.device)
        if state is None or state.shape != (3, groups) or not state[:2].isfinite().all():
            state = torch.stack([low, span, torch.full_like(low, self.step)])
        elif state[2, 0] != self.step:
            state = torch.stack(
                [
                    DECAY * state[0] + (1 - DECAY) * low,
                    DECAY * state[1] + (1 - DECAY) * span,
                    torch.full_like(low, self.step),
                ]
            )
        self.ranges[self.name] = state
        return state[0].clone(), state[1].clone()


def _noise(x: Tensor, groups: int, size: int) -> Tensor:
    """u in [0, 1), (rows, cols), for stochastic rounding.

    u is computed from the data, so that a recompute draws the same numbers.
    """
    rows, cols = x.shape
    first, last = [x[:, c].contiguous().view(torch.int32).long() & 0xFFFF for c in (0, -1)]
    low, high = [bits[:, None].expand(rows, groups) for bits in (first, last)]
    noise = draws(low, high, size, 0).float() * 2.0**-16
    return noise.reshape(rows, groups * size)[:, :cols]
