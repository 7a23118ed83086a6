"""What the command line shows: rich tables of a comparison and of a profile, for 80 columns on.

The module tree folds what repeats: neighbours whose whole subtrees keep the same bytes become one
line, `0-11  x12` with the bytes of one of them. Names give way to the numbers where a terminal is
narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mesa_train.memory.compare import Row
from mesa_train.memory.footprint import Footprint
from mesa_train.memory.text import format_bytes, format_ratio

# Cells and the style of the whole line.
_Line = tuple[Sequence[str | Text], str]

# A module below this share of either total is left out of the tree.
_LEAST_SHARE = 0.0005


def comparison(rows: Sequence[Row]) -> Table:
    """One line a method; columns that nobody asked for are left out."""
    with_error = any(row.gradient_error is not None for row in rows)
    with_time = any(row.time_ms is not None for row in rows)
    head = ["method", "kept for\nbackward", "less than\nplain"]
    head += ["gradient\nerror"] if with_error else []
    head += ["forward +\nbackward", "time vs.\nplain"] if with_time else []
    least = min((row.saved_bytes for row in rows if row.saved_bytes is not None), default=None)
    lines: list[_Line] = []
    for row in rows:
        ratio, error = row.saved_ratio, row.gradient_error
        line = [
            row.method,
            "-" if row.saved_bytes is None else format_bytes(row.saved_bytes),
            "-" if ratio is None else f"{ratio:.2f}x",
        ]
        if with_error:
            line.append("-" if error is None else f"{error:.2%}")
        if with_time:
            line.append("-" if row.time_ms is None else f"{row.time_ms:,.0f} ms")
            line.append("-" if row.time_ratio is None else f"{row.time_ratio:.2f}x")
        lines.append((line, "bold" if row.saved_bytes == least is not None else ""))
    return _table(head, lines)


def notes_of(rows: Sequence[Row]) -> list[str]:
    """The rows' notes, each once, with the methods that it is about unless it is about all."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            methods.setdefault(note, []).append(row.method)
    return [
        note if len(names) == len(rows) else f"{', '.join(names)}: {note}"
        for note, names in methods.items()
    ]


def by_operator(plain: Footprint, other: Footprint, name: str) -> Table:
    """Bytes by operator: plain against a policy, largest of the plain ones first."""
    before, after, whole = plain.by_operator, other.by_operator, plain.saved_bytes
    lines: list[_Line] = [
        ([operator, *_cells(before.get(operator, 0), whole, after.get(operator, 0))], "")
        for operator in dict.fromkeys([*before, *after])
    ]
    lines.append((["kept for backward", *_cells(whole, whole, other.saved_bytes)], "bold"))
    for what in ("parameter", "buffer"):
        sizes = [format_bytes(getattr(f, f"{what}_bytes")) for f in (plain, other)]
        lines.append(([f"{what}s", sizes[0], "", sizes[1], ""], ""))
    return _table(["operator", "plain", "share", name, "less"], lines, rule_before=len(lines) - 3)


def by_module(plain: Footprint, other: Footprint, name: str, depth: int | None = None) -> Table:
    """The module tree to `depth`, every line with its subtree's bytes: plain against a policy."""
    root = tree(plain, other)
    least = _LEAST_SHARE * plain.saved_bytes, _LEAST_SHARE * other.saved_bytes
    lines: list[_Line] = []
    for prefix, node in _lines(root, least, depth):
        label = Text.assemble((prefix, "dim"), node.label)
        if node.count > 1:
            label.append(f"  x{node.count}", style="cyan")
        lines.append(([label, *_cells(node.plain, plain.saved_bytes, node.other, node.count)], ""))
    return _table(["module", "plain", "share", name, "less"], lines)


@dataclasses.dataclass
class Node:
    """A module: bytes of its subtree under both methods, children, and how many such siblings."""

    label: str
    plain: int = 0
    other: int = 0
    children: list[Node] = dataclasses.field(default_factory=list)
    count: int = 1

    def child(self, label: str) -> Node:
        """The child of that name, made if it is not there."""
        for node in self.children:
            if node.label == label:
                return node
        self.children.append(Node(label))
        return self.children[-1]

    def same(self, other: Node) -> bool:
        """Whether two subtrees keep the same bytes in the same places."""
        return (
            (self.plain, self.other) == (other.plain, other.other)
            and len(self.children) == len(other.children)
            and all(
                a.label == b.label and a.same(b)
                for a, b in zip(self.children, other.children, strict=True)
            )
        )


def tree(plain: Footprint, other: Footprint) -> Node:
    """The module tree of two footprints of a model, in forward order, equal neighbours folded."""
    root = Node("(model)")
    for footprint, field in ((plain, "plain"), (other, "other")):
        for row in footprint.rows:
            path = [root]
            for part in row.module.split(".") if row.module else ():
                path.append(path[-1].child(part))
            for node in path:
                setattr(node, field, getattr(node, field) + row.saved_bytes)
    _fold(root)
    return root


def _fold(node: Node) -> None:
    """Joins equal numbered neighbours into one line, and an only child into its parent's."""
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
            if only.count == 1 and (only.plain, only.other) == (child.plain, child.other):
                child.label, child.children = f"{child.label}.{only.label}", only.children


def _lines(
    node: Node, least: tuple[float, float], depth: int | None, prefix: str = "", indent: str = ""
) -> Iterator[tuple[str, Node]]:
    yield prefix, node
    if depth == 0:
        return
    children = [
        child
        for child in node.children
        if child.plain * child.count > least[0] or child.other * child.count > least[1]
    ]
    for child in children:
        branch, below = ("└ ", "  ") if child is children[-1] else ("├ ", "│ ")
        deeper = None if depth is None else depth - 1
        yield from _lines(child, least, deeper, indent + branch, indent + below)


def _cells(before: int, whole: int, after: int, count: int = 1) -> list[str]:
    share = f"{count * before / whole:.1%}" if whole else ""
    return [format_bytes(before), share, format_bytes(after), format_ratio(before, after)]


def _table(
    head: Sequence[str],
    lines: Sequence[_Line],
    rule_before: int | None = None,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Rich narrows columns that may wrap before others: the names may, but their text will not.
    table.add_column(head[0])
    for title in head[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for index, (line, style) in enumerate(lines):
        if index == rule_before:
            table.add_section()
        name = line[0] if isinstance(line[0], Text) else Text(line[0])
        name.no_wrap, name.overflow = True, "ellipsis"
        table.add_row(name, *line[1:], style=style)
    return table
