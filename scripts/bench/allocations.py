"""Allocations of bits to operands: their policies, predicted errors and bytes, and the best of them.

`presets.py` measures the operands. The squared relative errors of the operands add up, and so do the
bytes that their codes save against 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mesa_train import Policy

# Operands that get their code together, by name.
OPERANDS = {
    "x_hat": ("layer_norm",),
    "last norm": ("last_norm",),
    "batch norm": ("batch_norm",),
    "activation": ("activation",),
    "q, k": ("attention.q", "attention.k"),
    "v": ("attention.v",),
    "out": ("attention.out", "linear"),
    "conv": ("conv",),
}


class Code(NamedTuple):
    """Bits of an element, and elements of a group."""

    bits: int
    group_size: int = 128

    def __str__(self) -> str:
        return f"{self.bits}" + (f" in groups of {self.group_size}" * (self.group_size != 128))

    def fields(self) -> dict[str, int]:
        """The fields of a policy."""
        return {"bits": self.bits, "group_size": self.group_size}


CODES = tuple(Code(bits) for bits in (8, 6, 5, 4, 3, 2))
# Codes of the presets with other group sizes.
FURTHER = {
    "x_hat": (Code(5, 96),),
    "last norm": (Code(8, 96),),
    "activation": (Code(5, 192), Code(4, 192)),
    "out": (Code(4, 192),),
}

Codes = Mapping[str, Code]


class Model(Protocol):
    """The saved bytes of a step with a policy."""

    def saved(self, policy: Policy) -> int:
        """Bytes."""


@dataclasses.dataclass
class Measured:
    """The operands of one model, with one choice of `recompute`.

    Attributes:
        bytes: of an operand's codes, less the bytes at 8 bits. Operands that are not stored are missing.
        errors: the relative gradient error of the operand alone.
    """

    bytes: dict[tuple[str, Code], int]
    errors: dict[tuple[str, Code], float]

    def variances(self, codes: Codes) -> dict[str, float]:
        """The squared error of each stored operand."""
        return {
            name: self.errors[name, code] ** 2
            for name, code in codes.items()
            if (name, code) in self.errors
        }


def codes_for(operand: str) -> tuple[Code, ...]:
    """The codes that are tried for an operand."""
    return (*CODES, *FURTHER.get(operand, ()))


def policy_of(codes: Codes, recompute: str, bits: int = 8) -> Policy:
    """The policy of an allocation. Operands that `codes` does not name have `bits`."""
    # "layer_norm" names the last norm too.
    others = {"last norm": Code(bits)} if "x_hat" in codes else {}
    named = {**others, **codes}
    overrides = {
        o: named[name].fields() for name in OPERANDS if name in named for o in OPERANDS[name]
    }
    return Policy(bits=bits, recompute=recompute, overrides=overrides)


def codes_of(policy: Policy, operands: Iterable[str]) -> dict[str, Code]:
    """The codes that a policy gives to operands."""
    found = {}
    for name in operands:
        operand = OPERANDS[name][-1]
        operator = "layer_norm" if name == "last norm" else operand.split(".")[0]
        fields = {**policy.overrides.get(operator, {}), **policy.overrides.get(operand, {})}
        found[name] = Code(
            fields.get("bits", policy.bits), fields.get("group_size", policy.group_size)
        )
    return found


def stored_bytes(saved: Callable[[Policy], int], recompute: str) -> dict[tuple[str, Code], int]:
    """The bytes of `Measured`, from a function that counts the saved bytes of a policy."""
    # Bytes add up among codes, but not between codes and uncompressed tensors, which operators share.
    base = saved(Policy(bits=8, recompute=recompute))
    found = {}
    for name in OPERANDS:
        less = saved(policy_of({name: Code(4)}, recompute)) - base
        known = {Code(8): 0, Code(4): less}
        if less:  # the operand is stored
            for code in codes_for(name):
                size = known.get(code)
                found[name, code] = (
                    saved(policy_of({name: code}, recompute)) - base if size is None else size
                )
    return found


def everyone(measured: Iterable[Measured]) -> list[str]:
    """The operands that a model stores, in the order of `OPERANDS`."""
    stored = {name for found in measured for name, _ in found.bytes}
    return [name for name in OPERANDS if name in stored]


def whole(models: Sequence[Model], recompute: str) -> list[int]:
    """The saved bytes of each model with 8 bits for all operands."""
    return [model.saved(Policy(bits=8, recompute=recompute)) for model in models]


def best(
    measured: Sequence[Measured], whole: Sequence[int], budgets: Sequence[int], top: int
) -> list[dict[str, Code]]:
    """The allocations within every budget with the smallest maximum of the predicted errors.

    Among equal maxima, the smallest sum of the variances comes first.

    Args:
        measured: the operands of each model.
        whole: saved bytes of each model with 8 bits for all operands.
        budgets: the most bytes that each model may save.
        top: how many allocations, best first.
    """
    names = everyone(measured)
    choices = {
        name: [c for c in codes_for(name) if any((name, c) in found.errors for found in measured)]
        for name in names
    }
    shape = [len(choices[name]) for name in names]

    def summed(values: Mapping[tuple[str, Code], float]) -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for axis, name in enumerate(names):
            of_name = [float(values.get((name, code), 0)) for code in choices[name]]
            sides = [-1 if k == axis else 1 for k in range(len(names))]
            total = total + torch.tensor(of_name, dtype=torch.float64).view(sides)
        return total

    worst = torch.zeros(shape, dtype=torch.float64)
    total = torch.zeros(shape, dtype=torch.float64)
    for found, base, budget in zip(measured, whole, budgets, strict=True):
        variance = summed({key: error**2 for key, error in found.errors.items()})
        over = base + summed(found.bytes) > budget
        worst = torch.maximum(worst, variance.masked_fill(over, torch.inf))
        total += variance
    order = (worst + 1e-6 * total).flatten().argsort()[:top]
    return [
        {
            name: choices[name][int(place)]
            for name, place in zip(names, torch.unravel_index(index, shape), strict=True)
        }
        for index in order
        if worst.flatten()[index] < torch.inf
    ]
