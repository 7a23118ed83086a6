"""Signs with a straight-through gradient (EcoFormer's codes): one bit for the gradient, one for the sign.

The node saves one bit per element: whether the gradient passes. The output gets a stash of one bit per
element, so the matmuls behind it save nothing more. The stash is lossless:

- On a CPU the row looks for zeros. With zeros, or NaNs, the output has two bits per element.
- On other devices the row does not read values, and the output always has two bits per element.

PyTorch saves one byte per element for the gradient, and the output for the matmuls behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.ops.base import kept_first
from mesa_train.ops.stepped import Stepped
from mesa_train.policy import VIEW
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed


class Signs:
    """Recipe: -1 and 1 from one bit per element, or -1, 0 and 1 from two.

    Args:
        shape: of the tensor.
    """

    __slots__ = ("shape",)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        positive, *negative = [
            bitmask.decode(bits, self.shape).to(dtype) for bits in saved.own(spec)
        ]
        return positive - negative[0] if negative else 2 * positive - 1


def clipped_sign(recorder: Recorder, func: Any, /, y: Tensor) -> Any:
    """Row of `mesa_train.utils.clipped_sign.clipped_sign`."""
    if not recorder.covers("activation", y) or recorder.lossless("activation", "input"):
        return NotImplemented
    result = recorder.exactly(torch.sign, y)
    with torch.no_grad():
        inside = recorder.bits(y.abs() < 1)
        planes = [recorder.bits(result > 0)]
        if not _all_signs(result):
            planes.append(recorder.bits(result < 0))
    name = recorder.context.name
    recorder.report.add(name, "clipped_sign", "input", "1 bit", inside.numel())
    size = sum([bits.numel() for bits in planes])
    recorder.report.add(name, "clipped_sign", "output", f"{len(planes)} bit", size)
    output = Stepped.apply(result, kept_first(recorder, uncompressed(inside)), (1.0, 0.0), y)
    recipe = Signs(tuple(result.shape))
    recorder.lineage.set(output, Stash(recipe, tuple(planes), cost=VIEW, dtype=result.dtype))
    return output


def _all_signs(result: Tensor) -> bool:
    """True if a tensor on a CPU is -1 or 1 everywhere. A fake tensor has no values and counts as such."""
    if result.device.type != "cpu":
        return False
    return type(result) is not Tensor or bool((result != 0).logical_and_(~result.isnan()).all())
