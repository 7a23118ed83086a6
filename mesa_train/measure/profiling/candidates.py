"""Find the candidates of a model: the stashes of its forward, with the choices for each.

A candidate is one operand of one operator in one module. A policy's override can name nothing
smaller. A candidate may be stored in 8, 6, 5, 4, 3 or 2 bits, saved uncompressed, or rebuilt: the
matmul that computed it is recomputed. On a GPU it may be offloaded. Three forwards on fake tensors
show the candidates and their choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mesa_train.codecs.affine import Affine
from mesa_train.measure.stash_log import BLOCK, Key, StashLog
from mesa_train.ops.linear import RecomputedLinear
from mesa_train.policy import Policy
from mesa_train.stash.offload import WINDOW
from mesa_train.stash.stash import Stash
from mesa_train.utils.policy_checks import AT_LEAST_8

from .blocks import GROUP, block_of, with_blocks

# The choices for a candidate that are not a number of bits: saved uncompressed, or rebuilt.
KEEP, REBUILD = "keep", "rebuild"
# In CPU memory between forward and backward, as codes or uncompressed.
OFFLOAD8, OFFLOAD = "8 bits, offloaded", "keep, offloaded"
OFFLOADED_AS: dict[int | str, int | str] = {OFFLOAD8: 8, OFFLOAD: KEEP}


@dataclasses.dataclass
class Candidate:
    """A saved tensor, or several with one name, for which the planner chooses.

    Args:
        key: (module, operator, operand).
        order: number of its first stash in the forward.
        matrices: (rows, cols) of every tensor stored for it.
        saved_bytes: bytes of these tensors if they are uncompressed.
        product: name of the Linear that is recomputed to rebuild the candidate, or None.
        source: the candidate from which the input of that Linear is rebuilt, or None.
        block: name of the block that contains it, or None.
        offloadable: whether it may be offloaded to CPU memory.
    """

    key: Key
    order: int
    matrices: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    saved_bytes: int = 0
    product: str | None = None
    source: Key | None = None
    block: str | None = None
    offloadable: bool = False

    @property
    def kind(self) -> tuple[str, str]:
        """(operator, operand)."""
        return self.key[1:]

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return sum(rows * cols for rows, cols in self.matrices)

    def choices(self) -> list[int | str]:
        """All choices for this candidate."""
        low = [] if self.key[1] in AT_LEAST_8 else [bits for bits in GROUP if bits < 8]
        offloaded = OFFLOADED_AS if self.offloadable else ()
        return [8, *low, KEEP, *offloaded, *([REBUILD] if self.product else [])]

    def bytes(self, choice: int | str) -> int:
        """Bytes that the candidate saves on the device.

        Args:
            choice: one of `choices()`.
        """
        if choice == REBUILD or choice in OFFLOADED_AS:
            return 0
        if choice == KEEP:
            return self.saved_bytes
        assert isinstance(choice, int)
        codec = Affine(choice, GROUP[choice])
        return sum(codec.bytes(rows, cols) for rows, cols in self.matrices)

    def offloaded_bytes(self, choice: int | str) -> int:
        """Bytes that the candidate offloads to CPU memory.

        Args:
            choice: one of `choices()`.
        """
        return self.bytes(OFFLOADED_AS[choice]) if choice in OFFLOADED_AS else 0


def first_in_flight(order: Sequence[tuple[Key, float]], stored: int) -> int:
    """Find the first offloaded stash that is on the device during its copy.

    In the forward the last stashes are still being copied to CPU memory. In the backward the next
    stashes are already being copied back. At most `WINDOW` stashes are copied at a time.

    Args:
        order: (key, share) of all entries in the order of the forward.
        stored: number of entries that exist.

    Returns:
        Index of that stash among the first `stored` entries.
    """
    remaining = WINDOW
    for index in range(stored - 1, -1, -1):
        remaining -= order[index][0][1] != BLOCK
        if not remaining:
            return index
    return 0


def add_offloaded_choices(
    table: dict[tuple[Key, int | str], float], candidates: Iterable[Candidate]
) -> None:
    """Add the offloaded choices to a table, each with the value of the choice without offload.

    Args:
        table: values by (key, choice); changed in place.
        candidates: all candidates.
    """
    for candidate in candidates:
        for choice in candidate.choices():
            if choice in OFFLOADED_AS and (candidate.key, OFFLOADED_AS[choice]) in table:
                table[candidate.key, choice] = table[candidate.key, OFFLOADED_AS[choice]]


def candidates_of(
    stored: StashLog, rebuilding: StashLog, uncompressed: StashLog, blocks: Sequence[str] = ()
) -> list[Candidate]:
    """List the candidates of a model from three logs.

    Args:
        stored: log of a forward with 8-bit codes.
        rebuilding: log of a forward with `recompute="linear"`, which keeps its stashes alive.
        uncompressed: log of a forward with 32 bits, which saves all tensors uncompressed.
        blocks: qualified names of the blocks.
    """
    candidates: dict[Key, Candidate] = {}
    for order, (key, _, matrix) in enumerate(stored.stored):
        if matrix is not None:
            candidate = candidates.setdefault(
                key, Candidate(key, order, block=block_of(key[0], blocks))
            )
            candidate.matrices.append(matrix)
    for key, size, _ in uncompressed.stored:
        if key in candidates:
            candidates[key].saved_bytes += size
    stored_keys = {key for key, *_ in rebuilding.stored}
    for key, stash in rebuilding.rebuilt.items():
        if key not in candidates or key in stored_keys:
            continue
        candidate = candidates[key]
        product = _product(stash)
        if product is None:
            continue
        linear = rebuilding.modules.get(id(product.tensors[0]))
        if linear is None:
            continue
        candidate.product = linear[1]
        candidate.source = next(
            (source for _, source in _leaves(product, rebuilding) if source in candidates), None
        )
    return list(candidates.values())


def _product(stash: Stash) -> Stash | None:
    """The recomputed Linear in a stash's recipe; None if there is none or more than one."""
    linears = [node for node in _nodes(stash) if isinstance(node.recipe, RecomputedLinear)]
    return linears[0] if len(linears) == 1 else None


def _leaves(stash: Stash, log: StashLog) -> Iterator[tuple[Stash, Key]]:
    """The stored stashes of a recipe, with their keys."""
    for node in _nodes(stash):
        if id(node) in log.leaves:
            yield log.leaves[id(node)]


def _nodes(stash: Stash) -> Iterator[Stash]:
    """A stash and all stashes of its recipe."""
    yield stash
    for source in stash.sources:
        yield from _nodes(source)


def weights_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the weight of every Linear, by its name."""
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2
    }


def as_policy(
    base: Policy,
    candidates: Sequence[Candidate],
    choices: Mapping[Key, int | str],
    siblings: Mapping[str, int] | None = None,
) -> Policy:
    """Make the policy of these choices.

    The policy has one override for each kind of operand, with the commonest choice. Then it has one
    for each candidate with another choice, then the overrides of the blocks (see `with_blocks`).
    Candidates without a choice follow the strategy of their block.

    Args:
        base: policy of all fields that the choices do not set.
        candidates: all candidates.
        choices: choice of each candidate and strategy of each block, by key.
        siblings: number of children of the parent of each block, by the parent's name.
    """
    strategies = {key[0]: str(choice) for key, choice in choices.items() if key[1] == BLOCK}
    candidates = [candidate for candidate in candidates if candidate.key in choices]
    sources = {candidate.source for candidate in candidates if choices[candidate.key] == REBUILD}
    changes = {
        candidate.key: _changes(choices[candidate.key], candidate.key in sources)
        for candidate in candidates
    }
    overrides: dict[str, dict[str, Any]] = {}
    common: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        same_kind = [changes[candidate.key] for candidate in candidates if candidate.kind == kind]
        # A candidate of the model itself has no module name for a pattern.
        of_root = [
            changes[candidate.key]
            for candidate in candidates
            if candidate.kind == kind and not candidate.key[0]
        ]
        common[kind] = of_root[0] if of_root else max(same_kind, key=same_kind.count)
        overrides[".".join(kind)] = common[kind]
    # A module's pattern covers its submodules, so the submodules' patterns come later. A field that
    # an earlier pattern changes, and this one does not, gets the value of the base policy again.
    for candidate in sorted(candidates, key=lambda c: c.key[0].count(".")):
        module, operator, operand = candidate.key
        other_modules = [
            other.key[0]
            for other in candidates
            if other.kind == candidate.kind and other.key != candidate.key
        ]
        is_covered = any(not other or module.startswith(other + ".") for other in other_modules)
        if (changes[candidate.key] != common[candidate.kind] or is_covered) and module:
            fields = sorted(
                {
                    field
                    for peer in candidates
                    if peer.kind == candidate.kind
                    for field in changes[peer.key]
                }
            )
            defaults = {field: getattr(base, field) for field in fields}
            overrides[f"{module}:{operator}.{operand}"] = defaults | changes[candidate.key]
    policy = dataclasses.replace(base, overrides={k: v for k, v in overrides.items() if v})
    return with_blocks(policy, strategies, siblings or {}) if strategies else policy


def _changes(choice: int | str, feeds_matmul: bool) -> dict[str, Any]:
    """The fields of an override for a choice."""
    if choice in OFFLOADED_AS:
        return {**_changes(OFFLOADED_AS[choice], feeds_matmul), "offload": True}
    if choice == REBUILD:
        return {"recompute": "linear"}
    if choice == KEEP:
        return {"bits": 32}
    assert isinstance(choice, int)
    changes: dict[str, Any] = {"bits": choice, "group_size": GROUP[choice]}
    if feeds_matmul and choice < 8:
        changes["rounding"] = "nearest"
    return changes
