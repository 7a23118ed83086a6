"""Build the tree of a model's modules with bytes, for reports; equal neighbours are folded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .footprint import Footprint


@dataclasses.dataclass
class Node:
    """A module of the tree.

    Args:
        label: last part of the module's name.
        sizes: bytes of the subtree, one entry for each method.
        children: the submodules.
        count: number of equal siblings that this node stands for.
    """

    label: str
    sizes: list[int]
    children: list[Node] = dataclasses.field(default_factory=list)
    count: int = 1

    def child(self, label: str) -> Node:
        """Return the child of that name; add it if it is missing."""
        for node in self.children:
            if node.label == label:
                return node
        self.children.append(Node(label, [0] * len(self.sizes)))
        return self.children[-1]

    def same(self, other: Node) -> bool:
        """True if two subtrees have the same bytes in the same places."""
        return (
            self.sizes == other.sizes
            and len(self.children) == len(other.children)
            and all(
                a.label == b.label and a.same(b)
                for a, b in zip(self.children, other.children, strict=True)
            )
        )


def grow(by_module: Sequence[Mapping[str, int]]) -> Node:
    """Build the tree of one model under several methods.

    Args:
        by_module: for each method, bytes by qualified module name, submodules not included.

    Returns:
        The root. Modules come in the order of their first appearance; equal neighbours are joined.
    """
    root = Node("(model)", [0] * len(by_module))
    for index, sizes in enumerate(by_module):
        for module, size in sizes.items():
            path = [root]
            for part in module.split(".") if module else ():
                path.append(path[-1].child(part))
            for node in path:
                node.sizes[index] += size
    _fold(root)
    return root


def _fold(node: Node) -> None:
    """Join equal numbered neighbours into one node, and an only child into its parent."""
    folded: list[Node] = []
    first = ""
    for child in node.children:
        if folded and first and child.label.isdigit() and folded[-1].same(child):
            folded[-1].count += 1
            folded[-1].label = f"{first}-{child.label}"
            continue
        folded.append(child)
        first = child.label if child.label.isdigit() else ""
    node.children = folded
    for child in folded:
        _fold(child)
        if len(child.children) == 1:
            only = child.children[0]
            if only.count == 1 and only.sizes == child.sizes:
                child.label, child.children = f"{child.label}.{only.label}", only.children


def forward_order(footprint: Footprint) -> dict[str, int]:
    """Bytes by module, submodules not included, in the order of the forward.

    Bytes that are offloaded to CPU memory count as 0.
    """
    sizes: dict[str, int] = {}
    for row in footprint.rows:
        sizes[row.module] = sizes.get(row.module, 0) + (0 if row.offloaded else row.saved_bytes)
    return sizes
