"""Make the tables of the command line with rich, for terminals of at least 80 columns.

The module tree folds repeated parts. Neighbours whose whole subtrees save the same bytes become one
line, `0-11  x12`, with the bytes of one of them. In a narrow terminal, names are shortened before
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from mesa_train.measure.footprint import Footprint
from mesa_train.measure.module_tree import Node, forward_order, grow
from mesa_train.utils.formatting import format_bytes, format_gib, format_ratio

from .columns import cell, notes, with_ratios

if TYPE_CHECKING:
    from mesa_train.estimate.estimator import Estimate
    from mesa_train.planner.plan import Plan

# The cells and the style of a line.
_Line = tuple[Sequence[str | Text], str]

# A module below this share of both totals is left out of the tree.
_LEAST_SHARE = 0.0005


# (key, heading, least width of a terminal that shows the column).
_COLUMNS = (
    ("saved_bytes", "saved for\nbackward", 0),
    ("saved_ratio", "less than\nplain", 100),
    ("offloaded_bytes", "in CPU\nmemory", 0),
    ("peak_bytes", "peak of\nstep", 0),
    ("resident_bytes", "resident\nset", 180),
    ("gradient_error", "gradient\nerror", 0),
    ("gradient_cosine", "cosine", 180),
    ("step_ms", "step\nms", 0),
    ("step_ratio", "step vs.\nplain", 100),
    ("images_per_s", "images\nper s", 120),
    ("weight_bytes", "weights", 180),
    ("gradient_bytes", "gradients", 180),
    ("optimizer_bytes", "optimizer", 180),
    ("largest_batch", "largest\nbatch", 0),
)


def comparison(rows: Sequence[Mapping[str, Any]], width: int = 80) -> Table:
    """Make a table with one line for each method.

    Columns that no row has are left out. A narrow terminal shows only the more important columns.

    Args:
        rows: the rows of the methods.
        width: characters in a line of the terminal.
    """
    rows = with_ratios(rows)
    columns = [
        (key, heading)
        for key, heading, least in _COLUMNS
        if any(row.get(key) is not None for row in rows) and width >= least
    ]
    sizes = [row["saved_bytes"] for row in rows if row.get("saved_bytes") is not None]
    lines: list[_Line] = []
    for row in rows:
        cells = [cell(key, row) for key, _ in columns]
        if width < 180:
            cells = [text.partition(" (")[0] for text in cells]
        style = "bold" if sizes and row.get("saved_bytes") == min(sizes) else ""
        lines.append(([row["method"], *[text or "-" for text in cells]], style))
    return _table(["method", *[heading for _, heading in columns]], lines)


def notes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The reasons why rows are incomplete, one line a reason."""
    return [f"{', '.join(methods)}: {note}" for note, methods in notes(rows).items()]


def by_operator(one: Footprint, other: Footprint, names: tuple[str, str]) -> Table:
    """Bytes by operator under two methods, the largest of the first method first.

    Args:
        one: footprint of the first method.
        other: footprint of the second method.
        names: names of the two methods.
    """
    before, after, whole = one.by_operator, other.by_operator, one.saved_bytes
    lines: list[_Line] = [
        ([operator, *_cells(before.get(operator, 0), whole, after.get(operator, 0))], "")
        for operator in dict.fromkeys([*before, *after])
    ]
    rule = len(lines)
    lines.append((["saved for backward", *_cells(whole, whole, other.saved_bytes)], "bold"))
    if one.offloaded_bytes or other.offloaded_bytes:
        sizes = [format_bytes(f.offloaded_bytes) for f in (one, other)]
        lines.append((["in CPU memory", sizes[0], "", sizes[1], ""], ""))
    for what in ("parameter", "buffer"):
        sizes = [format_bytes(getattr(f, f"{what}_bytes")) for f in (one, other)]
        lines.append(([f"{what}s", sizes[0], "", sizes[1], ""], ""))
    head = ["operator", names[0], "share", names[1], "less"]
    return _table(head, lines, rule_before=rule)


def by_module(
    one: Footprint, other: Footprint, names: tuple[str, str], depth: int | None = None
) -> Table:
    """The module tree; each line has the bytes of its subtree under two methods.

    Args:
        one: footprint of the first method.
        other: footprint of the second method.
        names: names of the two methods.
        depth: levels to show; None for all.
    """
    root = grow([forward_order(one), forward_order(other)])
    least = _LEAST_SHARE * one.saved_bytes, _LEAST_SHARE * other.saved_bytes
    lines: list[_Line] = []
    for prefix, node in _lines(root, least, depth):
        label = Text.assemble((prefix, "dim"), node.label)
        if node.count > 1:
            label.append(f"  x{node.count}", style="cyan")
        before, after = node.sizes
        lines.append(([label, *_cells(before, one.saved_bytes, after, node.count)], ""))
    return _table(["module", names[0], "share", names[1], "less"], lines)


def stored(footprint: Footprint) -> Table | None:
    """How a policy stored each operand and why, by operator; None without a policy."""
    if footprint.stored is None:
        return None
    lines: list[_Line] = [
        ([f"{operator}.{operand}", how, str(calls), format_bytes(size)], "")
        for (operator, operand, how), (calls, size) in footprint.stored.by_operator().items()
    ]
    return _table(["operand", "saved as", "calls", "size"], lines)


def _lines(
    node: Node, least: tuple[float, float], depth: int | None, prefix: str = "", indent: str = ""
) -> Iterator[tuple[str, Node]]:
    """(branch of the tree, node) for each line of the tree."""
    yield prefix, node
    if depth == 0:
        return
    children = [
        child
        for child in node.children
        if any(size * child.count > low for size, low in zip(child.sizes, least, strict=True))
    ]
    for child in children:
        branch, below = ("└ ", "  ") if child is children[-1] else ("├ ", "│ ")
        deeper = None if depth is None else depth - 1
        yield from _lines(child, least, deeper, indent + branch, indent + below)


def _cells(before: int, whole: int, after: int, count: int = 1) -> list[str]:
    """Bytes, share, bytes of the other method, and ratio."""
    share = f"{count * before / whole:.1%}" if whole else ""
    return [format_bytes(before), share, format_bytes(after), format_ratio(before, after)]


def _table(
    head: Sequence[str],
    lines: Sequence[_Line],
    rule_before: int | None = None,
    whole_names: bool = False,
) -> Table:
    """A table in the style of all commands."""
    # Whole names need the space between columns.
    padding = (0, 0, 0, 1) if whole_names else (0, 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    # Rich narrows the columns that may wrap first. The column of names may wrap, but its text may
    # not.
    table.add_column(head[0], no_wrap=whole_names)
    for title in head[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for index, (line, style) in enumerate(lines):
        if index == rule_before:
            table.add_section()
        name = line[0] if isinstance(line[0], Text) else Text(line[0])
        if not whole_names:
            name.no_wrap, name.overflow = True, "ellipsis"
        table.add_row(name, *line[1:], style=style)
    return table


def prediction(plan: Plan) -> Table:
    """The predicted memory, time and error of a step with a plan's policy, beside plain."""
    own, plain = plan.prediction, plan.plain
    lines: list[_Line] = [
        (
            ["peak of the step", format_bytes(plain.peak_bytes), format_bytes(own.peak_bytes)],
            "bold",
        ),
        (
            ["saved for backward", format_bytes(plain.saved_bytes), format_bytes(own.saved_bytes)],
            "",
        ),
    ]
    if own.offloaded_bytes:
        lines.append((["in CPU memory", "0", format_bytes(own.offloaded_bytes)], ""))
    if own.step_s is not None and plain.step_s is not None:
        times = [f"{1e3 * s:,.0f} ms" for s in (plain.step_s, own.step_s)]
        lines.append((["forward + backward", *times], ""))
    errors = [f"{error:.2%}" for error in (plain.gradient_error, own.gradient_error)]
    lines.append((["gradient error", *errors], ""))
    return _table(["predicted", "plain", "plan"], lines)


def choices(plan: Plan) -> Table:
    """The number of stashes of each kind under each choice."""
    lines: list[_Line] = [([kind, how, str(n)], "") for kind, how, n in sorted(plan.summary())]
    return _table(["stash", "saved as", "places"], lines)


def estimates(found: Sequence[Estimate]) -> list[Table | str]:
    """Tables of the bytes on each GPU: model states, activations by policy, and largest batches."""
    setups = {_setup(e): e for e in found}
    policies = list(dict.fromkeys(e.policy for e in found))
    by_place = {(_setup(e), e.policy): e for e in found}
    held: list[_Line] = []
    for name, e in setups.items():
        own = e.states
        sizes = (
            own.weights,
            own.gradients,
            own.optimizer,
            own.gathered,
            own.gpu,
            own.cpu,
            own.disk,
        )
        held.append(([name, *map(format_gib, sizes)], ""))
    head = ["GiB", "weights", "grads", "states", "gather", "a GPU", "main\nmemory", "disk"]
    # The bytes depend on copies of float32 weights: they are equal for all setups with them, and
    # without.
    added: dict[tuple[int, ...], list[str]] = {}
    for name in setups:
        own_sizes = tuple(by_place[name, p].activations for p in policies if (name, p) in by_place)
        added.setdefault(own_sizes, []).append(name)
    activations: list[_Line] = []
    for names in added.values():
        places = [by_place.get((names[0], p)) for p in policies]
        cells = [format_gib(e.activations if e is not None else 0) for e in places]
        said = names[0] if len(names) == 1 else f"{len(names)} others" if activations else "all"
        activations.append(([said, *cells], ""))
    largest: list[_Line] = []
    for name in setups:
        places = [by_place.get((name, p)) for p in policies]
        largest.append(([name, *map(_largest, places)], ""))
    columns = [
        p.replace("checkpoint", "check-\npoint")
        .replace("-recompute", "-\nrecom-\npute")
        .replace("+offload", "+off-\nload")
        for p in (p.replace("+", "\n+") for p in policies)
    ]
    images = found[0].batch
    return [
        _table(head, held, whole_names=True),
        f"Activations of {images} images, GiB a GPU:",
        _table(["", *columns], activations, whole_names=True),
        f"Largest batch a GPU (in brackets where {images} do not fit):",
        _table(["", *columns], largest, whole_names=True),
    ]


def _setup(e: Estimate) -> str:
    """A setup in words."""
    away = {"none": "", "cpu": " CPU", "optimizer": " CPU states", "nvme": " NVMe"}
    return e.strategy + away[e.offload]


def _largest(e: Estimate | None) -> str:
    """The largest batch as text; in brackets if the asked batch does not fit."""
    if e is None:
        return "-"
    if e.reason == "CPU memory":
        return "memory"
    size = e.largest_batch
    said = (
        f"{size:,}" if size < 1e4 else f"{size / 1e3:.0f}k" if size < 1e6 else f"{size / 1e6:.0f}M"
    )
    return said if e.fits else f"({said})"
