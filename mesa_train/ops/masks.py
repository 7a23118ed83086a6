"""Bool masks as one bit per element, made once for all operators that read the mask.

A dim along which the mask is expanded takes no bits. Attention adds its mask to the scores as
numbers. PyTorch makes these numbers of a bool mask in each layer, and saves them. Here they are
rebuilt from the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.policy import CHEAP, VIEW
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed


class Bits:
    """Recipe: a mask of `shape` from one bit per element of `compact`, its shape before expansion."""

    def __init__(self, compact: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.compact, self.shape = compact, shape

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return bitmask.decode(saved.own(spec)[0], self.compact).to(dtype).expand(self.shape)


class Additive:
    """Recipe: a bool mask as the numbers that are added to the scores, `masked` for False."""

    def __init__(self, masked: float) -> None:
        self.masked = masked

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        mask = saved.value(spec.sources[0])
        return additive(mask, spec.dtype, self.masked).to(dtype)


def additive(mask: Tensor, dtype: torch.dtype, masked: float) -> Tensor:
    """A bool mask as the numbers that are added to the scores. `masked`: the number for False."""
    return torch.where(mask, 0.0, torch.full((), masked, dtype=dtype, device=mask.device))


def bits_of(recorder: Recorder, mask: Tensor, label: str) -> Stash:
    """The bits of a bool mask, made once while the mask exists. `label`: the operator in reports."""
    known = recorder.lineage.get(mask)
    if known is not None:
        recorder.report.add(recorder.context.name, label, "mask", "shared", 0)
        return known
    compact = mask.detach()
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            compact = compact.narrow(dim, 0, 1)
    bits = recorder.bits(compact)
    recorder.report.add(recorder.context.name, label, "mask", "1 bit", bits.numel())
    recipe = Bits(tuple(compact.shape), tuple(mask.shape))
    stash = Stash(recipe, (bits,), cost=VIEW, dtype=torch.bool)
    recorder.lineage.set(mask, stash)
    return stash


def attention_mask(
    recorder: Recorder, given: Tensor | None, mask: Tensor | None, masked: float | None
) -> Stash | None:
    """The stash of attention's mask.

    Args:
        given: the mask that the user passed.
        mask: the same mask as the kernel reads it.
        masked: the number for False if `mask` has numbers for a bool `given`; None if `mask` is
            bool too.
    """
    if given is None or mask is None:
        return None
    if (
        given.dtype is not torch.bool
        or given.numel() < recorder.context.rules["fallback", "saved"].min_bytes
    ):
        return uncompressed(mask)
    bits = bits_of(recorder, given, "attention")
    if masked is None:
        return bits
    return Stash(Additive(masked), (), (bits,), cost=CHEAP, dtype=mask.dtype)


def cast_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: every float dtype but float64."""
    if tensor.dtype in (torch.float64, dtype):
        return tensor
    made = tensor.to(dtype)
    # PyTorch's choice of a kernel also depends on whether the operands require gradients.
    return made if torch.compiler.is_compiling() else made.requires_grad_(tensor.requires_grad)


def cast_mask(recorder: Recorder, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of a mask, made once for all layers while the mask exists."""
    if mask.requires_grad or mask.dtype in (torch.float64, dtype):
        return cast_operand(mask, dtype)
    known = recorder.lineage.cast(mask, dtype)
    if known is None:
        known = uncompressed(mask.to(dtype))
        recorder.lineage.set_cast(mask, dtype, known)
    return known.tensors[0]
