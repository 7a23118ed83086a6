"""Candidates: the stashes that a model's forward makes, and what else could be done with each.

A candidate is one operand of one operator in one module, the finest thing that a policy's override can
name. It may be stored in 8, 4 or 2 bits, kept as it is, or rebuilt by repeating the matmul that made
it. What there is to choose from is read off three forwards on tensors without data.
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

from .blocks import GROUP, block_of, with_blocks

# The choices for a candidate: bits, then what is no number of bits.
KEEP, REBUILD = "keep", "rebuild"
# In CPU memory between forward and backward, and as what.
OFFLOAD8, OFFLOAD = "8 bits, offloaded", "keep, offloaded"
OFFLOADED_AS: dict[int | str, int | str] = {OFFLOAD8: 8, OFFLOAD: KEEP}


@dataclasses.dataclass
class Candidate:
    """key: (module, operator, operand). order: of its first stash in the forward.

    matrices: the (rows, cols) of every tensor stored for it. saved_bytes: as whole tensors.
    product: name of the Linear whose repetition rebuilds it, or None. source: for that Linear, the
    candidate that its input is rebuilt from. block: that it stands in, or None. offloadable: to CPU memory.
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
        """Elements stored."""
        return sum(rows * cols for rows, cols in self.matrices)

    def choices(self) -> list[int | str]:
        """What may be done with it."""
        low = [] if self.key[1] == "fallback" else [4, 2]
        offloaded = OFFLOADED_AS if self.offloadable else ()
        return [8, *low, KEEP, *offloaded, *([REBUILD] if self.product else [])]

    def bytes(self, choice: int | str) -> int:
        """Bytes that it keeps on the device under a choice."""
        if choice == REBUILD or choice in OFFLOADED_AS:
            return 0
        if choice == KEEP:
            return self.saved_bytes
        assert isinstance(choice, int)
        codec = Affine(choice, GROUP[choice])
        return sum(codec.bytes(rows, cols) for rows, cols in self.matrices)

    def offloaded_bytes(self, choice: int | str) -> int:
        """Bytes that it moves to CPU memory under a choice."""
        return self.bytes(OFFLOADED_AS[choice]) if choice in OFFLOADED_AS else 0


def under_way(order: Sequence[tuple[Key, float]], stored: int) -> int:
    """Of the first `stored` entries of an order, the first that is on the device even if it is offloaded:
    on its way out in the forward, on its way back in the backward."""
    left = WINDOW
    for index in range(stored - 1, -1, -1):
        left -= order[index][0][1] != BLOCK
        if not left:
            return index
    return 0


def also_offloaded(
    table: dict[tuple[Key, int | str], float], candidates: Iterable[Candidate]
) -> None:
    """Enter for what is offloaded what holds for the same where it is not."""
    for candidate in candidates:
        for choice in candidate.choices():
            if choice in OFFLOADED_AS and (candidate.key, OFFLOADED_AS[choice]) in table:
                table[candidate.key, choice] = table[candidate.key, OFFLOADED_AS[choice]]


def candidates_of(
    stored: StashLog, rebuilding: StashLog, whole: StashLog, blocks: Sequence[str] = ()
) -> list[Candidate]:
    """The candidates of a model, from reports of 8 bits, of `recompute="linear"` and of 32 bits."""
    candidates: dict[Key, Candidate] = {}
    for order, (key, _, matrix) in enumerate(stored.stored):
        if matrix is not None:
            candidate = candidates.setdefault(
                key, Candidate(key, order, block=block_of(key[0], blocks))
            )
            candidate.matrices.append(matrix)
    for key, size, _ in whole.stored:
        if key in candidates:
            candidates[key].saved_bytes += size
    still = {key for key, *_ in rebuilding.stored}
    for key, stash in rebuilding.rebuilt.items():
        if key not in candidates or key in still:
            continue
        candidate = candidates[key]
        product = _product(stash)
        if product is None:
            continue
        named = rebuilding.modules.get(id(product.tensors[0]))
        if named is None:
            continue
        candidate.product = named[1]
        candidate.source = next(
            (k for s, k in _leaves(product, rebuilding) if k in candidates), None
        )
    return list(candidates.values())


def _product(stash: Stash) -> Stash | None:
    """The repeated Linear in a stash's recipe, if it is one and the only one."""
    found = [s for s in _nodes(stash) if isinstance(s.recipe, RecomputedLinear)]
    return found[0] if len(found) == 1 else None


def _leaves(stash: Stash, log: StashLog) -> Iterator[tuple[Stash, Key]]:
    for node in _nodes(stash):
        if id(node) in log.leaves:
            yield log.leaves[id(node)]


def _nodes(stash: Stash) -> Iterator[Stash]:
    yield stash
    for source in stash.sources:
        yield from _nodes(source)


def weights_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear by its name."""
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2
    }


def as_policy(
    base: Policy,
    candidates: Sequence[Candidate],
    choices: Mapping[Key, int | str],
    rows: Mapping[str, int] | None = None,
) -> Policy:
    """The policy that does with every candidate and block what `choices` says: one override an operand
    with the commonest choice, one for each candidate that differs, then those of the blocks (see
    `with_blocks`). Candidates without a choice are left to their block's."""
    modes = {key[0]: str(choice) for key, choice in choices.items() if key[1] == BLOCK}
    candidates = [candidate for candidate in candidates if candidate.key in choices]
    sources = {s.source for s in candidates if choices[s.key] == REBUILD}
    wanted = {s.key: _changes(choices[s.key], s.key in sources) for s in candidates}
    overrides: dict[str, dict[str, Any]] = {}
    common: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in dict.fromkeys(s.kind for s in candidates):
        own = [wanted[s.key] for s in candidates if s.kind == kind]
        # A candidate of the model itself has no name of its own in a pattern.
        rooted = [wanted[s.key] for s in candidates if s.kind == kind and not s.key[0]]
        common[kind] = rooted[0] if rooted else max(own, key=own.count)
        overrides[".".join(kind)] = common[kind]
    # A module's pattern covers its submodules: theirs have to come later. What a pattern before it
    # changes and this one does not goes back to the policy's own.
    for candidate in sorted(candidates, key=lambda s: s.key[0].count(".")):
        module, operator, operand = candidate.key
        outer = [
            o.key[0] for o in candidates if o.kind == candidate.kind and o.key != candidate.key
        ]
        covered = any(not o or module.startswith(o + ".") for o in outer)
        if (wanted[candidate.key] != common[candidate.kind] or covered) and module:
            fields = sorted(
                {f for s in candidates if s.kind == candidate.kind for f in wanted[s.key]}
            )
            back = {field: getattr(base, field) for field in fields}
            overrides[f"{module}:{operator}.{operand}"] = back | wanted[candidate.key]
    own_policy = dataclasses.replace(base, overrides={k: v for k, v in overrides.items() if v})
    return with_blocks(own_policy, modes, rows or {}) if modes else own_policy


def _changes(choice: int | str, feeds_matmul: bool) -> dict[str, Any]:
    """The fields of an override."""
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
