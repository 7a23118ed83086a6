"""List the strategies for a whole block: stash by stash, left to PyTorch, or checkpointed.

A checkpointed block saves its input, uncompressed or as codes, and recomputes the rest at its
backward. During its backward, PyTorch's tensors or codes hold the rest. So a block's strategy is
one choice for all of its stashes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mesa_train.measure.stash_log import BLOCK
from mesa_train.policy import Policy

# Group size by bits of the codes. Fewer bits get smaller groups: the error grows with a group's
# range, and the scales of a group of 32 cost 1 bit an element.
GROUP = {8: 128, 6: 128, 5: 64, 4: 64, 3: 32, 2: 32}
# The strategy of a block whose stashes are chosen one by one.
STASHES = "stash by stash"


class BlockStrategy(NamedTuple):
    """One strategy for all stashes of a block.

    Args:
        checkpointed: the block saves its input alone and recomputes the rest.
        bits: bits of the codes of the input; None saves the input uncompressed.
        codes: the stashes are 8-bit codes; False leaves them to PyTorch.
        offloaded: the input is in CPU memory between forward and backward.
    """

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
    """The costs of one strategy for one block.

    Args:
        saved_bytes: bytes on the device until the block's backward.
        seconds: seconds beyond the plain step.
        variance: squared relative error that the strategy adds to the gradient.
        offloaded_bytes: bytes in CPU memory.
    """

    saved_bytes: int
    seconds: float
    variance: float
    offloaded_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Block:
    """A block with its costs under every strategy except stash by stash.

    Args:
        name: qualified name of the module.
        options: costs by the name of the strategy.
    """

    name: str
    options: Mapping[str, BlockOption]

    @property
    def key(self) -> tuple[str, str, str]:
        """The block's key among the choices."""
        return self.name, BLOCK, ""


def block_of(module: str, blocks: Sequence[str]) -> str | None:
    """The block that a module is or is part of, None if there is none. Blocks are never nested."""
    return next(
        (block for block in blocks if module == block or module.startswith(block + ".")), None
    )


def with_blocks(
    policy: Policy, strategies: Mapping[str, str], siblings: Mapping[str, int]
) -> Policy:
    """Return `policy` with the strategy of every block.

    Args:
        policy: policy of the stashes that are chosen one by one.
        strategies: name of the strategy by block.
        siblings: number of children of a parent module, by the parent's name. If all children are
            blocks with one strategy, one pattern names them.
    """
    checkpointed: list[str] = []
    overrides: dict[str, Mapping[str, Any]] = dict(policy.overrides)
    for pattern, name in _patterns(strategies, siblings):
        if name == STASHES:
            continue
        strategy = STRATEGIES[name]
        if strategy.checkpointed:
            checkpointed.append(pattern)
        codes = {"bits": 8, "group_size": GROUP[8], "recompute": "cheap", "rounding": "auto"}
        overrides[pattern] = codes if strategy.codes else {"enabled": False}
        if strategy.bits is not None:
            overrides[f"{pattern}:checkpoint"] = {
                "enabled": True,
                "checkpoint_inputs": strategy.bits,
                "group_size": GROUP[strategy.bits],
                **({"offload": True} if strategy.offloaded else {}),
            }
    return dataclasses.replace(policy, checkpoint=tuple(checkpointed), overrides=overrides)


def _patterns(strategies: Mapping[str, str], siblings: Mapping[str, int]) -> list[tuple[str, str]]:
    """(pattern, strategy) for all blocks, in their order."""
    parents: dict[str, list[str]] = {}
    for name in strategies:
        parents.setdefault(name.rpartition(".")[0], []).append(name)
    patterns = []
    for parent, names in parents.items():
        used = {strategies[name] for name in names}
        if parent and len(names) == siblings.get(parent) and len(names) > 1 and len(used) == 1:
            patterns.append((f"{parent}.*", used.pop()))
        else:
            patterns += [(name, strategies[name]) for name in names]
    return patterns
