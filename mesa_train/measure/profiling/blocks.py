"""What may be done with a whole block: stash by stash, left to PyTorch, or checkpointed.

A checkpointed block keeps its input, as it is or as codes, and makes the rest again when its turn comes
in the backward; for that time the rest is kept by PyTorch or as codes. So a choice for a block is one
for all of its stashes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mesa_train.measure.stash_log import BLOCK
from mesa_train.policy import Policy

# Bits of codes: elements of a group. Fewer bits get smaller groups: the error grows with a group's
# range, and the scales of a group of 32 cost a bit an element.
GROUP = {8: 128, 4: 64, 2: 32}
# The choice of a block whose stashes are chosen one by one.
STASHES = "stash by stash"


class BlockStrategy(NamedTuple):
    """checkpointed: keeps its input alone. bits: of the input, None for the tensor itself. codes: its
    stashes are 8-bit codes, else PyTorch's own tensors. offloaded: the input waits in CPU memory."""

    checkpointed: bool
    bits: int | None = None
    codes: bool = False
    offloaded: bool = False


STRATEGIES: dict[str, BlockStrategy] = {
    "PyTorch": BlockStrategy(False),
    "checkpoint": BlockStrategy(True),
    "checkpoint, input 8 bits": BlockStrategy(True, 8),
    "checkpoint, input 4 bits": BlockStrategy(True, 4),
    "checkpoint of codes": BlockStrategy(True, None, True),
    "checkpoint of codes, input 8 bits": BlockStrategy(True, 8, True),
    "checkpoint of codes, input 4 bits": BlockStrategy(True, 4, True),
    "checkpoint, input 8 bits, offloaded": BlockStrategy(True, 8, False, True),
    "checkpoint of codes, input 8 bits, offloaded": BlockStrategy(True, 8, True, True),
}
PYTORCH = "PyTorch"


class BlockOption(NamedTuple):
    """What a block takes in a mode: bytes saved until its backward, seconds beyond plain's, variance
    of the gradient, bytes offloaded to CPU memory."""

    saved_bytes: int
    seconds: float
    variance: float
    offloaded_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Block:
    """A block with what it takes in every mode but stash by stash."""

    name: str
    options: Mapping[str, BlockOption]

    @property
    def key(self) -> tuple[str, str, str]:
        """Its key among the choices."""
        return self.name, BLOCK, ""


def block_of(module: str, blocks: Sequence[str]) -> str | None:
    """The block that a module is or stands in; blocks are never nested."""
    return next((b for b in blocks if module == b or module.startswith(b + ".")), None)


def with_blocks(policy: Policy, modes: Mapping[str, str], rows: Mapping[str, int]) -> Policy:
    """`policy` with every block in its mode.

    modes: by block. rows: how many modules stand in a row, by the name of what holds them: where all
    of them have one mode, one pattern names them.
    """
    checkpointed: list[str] = []
    overrides: dict[str, Mapping[str, Any]] = dict(policy.overrides)
    for pattern, name in _patterns(modes, rows):
        if name == STASHES:
            continue
        mode = STRATEGIES[name]
        if mode.checkpointed:
            checkpointed.append(pattern)
        eight = {"bits": 8, "group_size": GROUP[8], "recompute": "cheap", "rounding": "auto"}
        overrides[pattern] = eight if mode.codes else {"enabled": False}
        if mode.bits is not None:
            overrides[f"{pattern}:checkpoint"] = {
                "enabled": True,
                "checkpoint_inputs": mode.bits,
                "group_size": GROUP[mode.bits],
                **({"offload": True} if mode.offloaded else {}),
            }
    return dataclasses.replace(policy, checkpoint=tuple(checkpointed), overrides=overrides)


def _patterns(modes: Mapping[str, str], rows: Mapping[str, int]) -> list[tuple[str, str]]:
    """(pattern, mode) for all blocks, in their order."""
    parents: dict[str, list[str]] = {}
    for name in modes:
        parents.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for parent, names in parents.items():
        own = {modes[name] for name in names}
        if parent and len(names) == rows.get(parent) and len(names) > 1 and len(own) == 1:
            found.append((f"{parent}.*", own.pop()))
        else:
            found += [(name, modes[name]) for name in names]
    return found
