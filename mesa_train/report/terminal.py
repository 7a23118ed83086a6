"""Make the tables of the command line with rich, for terminals of at least 80 columns.

The module tree folds repeated parts. Neighbours whose whole subtrees save the same bytes become one
line, `0-11  x12`, with the bytes of one of them. In a narrow terminal, names are shortened before
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    from mesa_train.measure.flops import Flops
    from mesa_train.planner.plan import Plan

# The cells and the style of a line.
_Line = tuple[Sequence[str | Text], str]

# A module below this share of both totals is left out of the tree.
_MIN_SHARE = 0.0005


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
        for key, heading, min_width in _COLUMNS
        if any(row.get(key) is not None for row in rows) and width >= min_width
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
    first, second, total = one.by_operator, other.by_operator, one.saved_bytes
    lines: list[_Line] = [
        ([operator, *_cells(first.get(operator, 0), total, second.get(operator, 0))], "")
        for operator in dict.fromkeys([*first, *second])
    ]
    rule = len(lines)
    lines.append((["saved for backward", *_cells(total, total, other.saved_bytes)], "bold"))
    if one.offloaded_bytes or other.offloaded_bytes:
        sizes = [format_bytes(footprint.offloaded_bytes) for footprint in (one, other)]
        lines.append((["in CPU memory", sizes[0], "", sizes[1], ""], ""))
    for kind in ("parameter", "buffer"):
        sizes = [format_bytes(getattr(footprint, f"{kind}_bytes")) for footprint in (one, other)]
        lines.append(([f"{kind}s", sizes[0], "", sizes[1], ""], ""))
    head = ["operator", names[0], "share", names[1], "less"]
    return _table(head, lines, rule_before=rule)


def by_module(
    one: Footprint,
    other: Footprint,
    names: tuple[str, str],
    depth: int | None = None,
    operations: Flops | None = None,
) -> Table:
    """The module tree; each line has the bytes of its subtree under two methods, and its operations.

    Args:
        one: footprint of the first method.
        other: footprint of the second method.
        names: names of the two methods.
        depth: levels to show; None for all.
        operations: operations of the forward; None leaves the column out.
    """
    columns = [forward_order(one), forward_order(other)]
    totals = [one.saved_bytes, other.saved_bytes]
    if operations is not None:
        columns.append(operations.by_module)
        totals.append(operations.total)
    lines: list[_Line] = []
    for prefix, node in _lines(grow(columns), [_MIN_SHARE * total for total in totals], depth):
        label = Text.assemble((prefix, "dim"), node.label)
        if node.count > 1:
            label.append(f"  x{node.count}", style="cyan")
        first, second, *counted = node.sizes
        cells = _cells(first, one.saved_bytes, second, node.count)
        lines.append(([label, *cells, *[_giga(count) for count in counted]], ""))
    head = ["module", names[0], "share", names[1], "less"]
    return _table([*head, *(["GFLOPs"] if operations is not None else [])], lines)


def energy(parts: Mapping[str, tuple[int, int]], energy_of: Callable[[int, int], float]) -> Table:
    """Multiplications, additions and energy of one image, a line for each part of a model.

    Args:
        parts: (multiplications, additions) by name of the part.
        energy_of: from the two numbers to pJ.
    """
    total = tuple(sum(part[index] for part in parts.values()) for index in (0, 1))
    lines: list[_Line] = [
        ([name, *map(_giga, part), f"{energy_of(*part) / 1e9:.3f}"], "bold" * (name == "total"))
        for name, part in [*parts.items(), ("total", (total[0], total[1]))]
    ]
    head = ["part", "multiplications, G", "additions, G", "energy, mJ"]
    return _table(head, lines, rule_before=len(parts))


def _giga(count: int) -> str:
    """A count in units of 1e9."""
    return f"{count / 1e9:.3f}" if count else ""


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
    node: Node,
    min_sizes: Sequence[float],
    depth: int | None,
    prefix: str = "",
    indent: str = "",
) -> Iterator[tuple[str, Node]]:
    """(branch of the tree, node) for each line of the tree."""
    yield prefix, node
    if depth == 0:
        return
    children = [
        child
        for child in node.children
        if any(
            size * child.count > minimum
            for size, minimum in zip(child.sizes, min_sizes, strict=True)
        )
    ]
    for child in children:
        branch, below = ("└ ", "  ") if child is children[-1] else ("├ ", "│ ")
        deeper = None if depth is None else depth - 1
        yield from _lines(child, min_sizes, deeper, indent + branch, indent + below)


def _cells(first: int, total: int, second: int, count: int = 1) -> list[str]:
    """Bytes, share, bytes of the other method, and ratio."""
    share = f"{count * first / total:.1%}" if total else ""
    return [format_bytes(first), share, format_bytes(second), format_ratio(first, second)]


def _table(
    head: Sequence[str],
    lines: Sequence[_Line],
    rule_before: int | None = None,
    whole_names: bool = False,
) -> Table:
    """A table in the style of all commands."""
    # Whole names need the space between columns. With ten columns, one space is left in 80.
    padding = (0, 0, 0, 1 if len(head) < 10 else 0) if whole_names else (0, 1)
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
    planned, plain = plan.prediction, plan.plain
    lines: list[_Line] = [
        (
            ["peak of the step", format_bytes(plain.peak_bytes), format_bytes(planned.peak_bytes)],
            "bold",
        ),
        (
            [
                "saved for backward",
                format_bytes(plain.saved_bytes),
                format_bytes(planned.saved_bytes),
            ],
            "",
        ),
    ]
    if planned.offloaded_bytes:
        lines.append((["in CPU memory", "0", format_bytes(planned.offloaded_bytes)], ""))
    if planned.step_s is not None and plain.step_s is not None:
        times = [f"{1e3 * s:,.0f} ms" for s in (plain.step_s, planned.step_s)]
        lines.append((["forward + backward", *times], ""))
    errors = [f"{error:.2%}" for error in (plain.gradient_error, planned.gradient_error)]
    lines.append((["gradient error", *errors], ""))
    return _table(["predicted", "plain", "plan"], lines)


def choices(plan: Plan) -> Table:
    """The number of stashes of each kind under each choice."""
    lines: list[_Line] = [([kind, how, str(n)], "") for kind, how, n in sorted(plan.summary())]
    return _table(["stash", "saved as", "places"], lines)


def estimates(rows: Sequence[Estimate]) -> list[Table | str]:
    """Tables of the bytes on each GPU: model states, activations by policy, and largest batches."""
    setups = {_setup(row): row for row in rows}
    policies = list(dict.fromkeys(row.policy for row in rows))
    by_place = {(_setup(row), row.policy): row for row in rows}
    states: list[_Line] = []
    for name, row in setups.items():
        model_states = row.states
        columns_of_states = (
            model_states.weights,
            model_states.gradients,
            model_states.optimizer,
            model_states.gathered,
            model_states.gpu,
            model_states.cpu,
            model_states.disk,
        )
        states.append(([name, *map(format_gib, columns_of_states)], ""))
    head = ["GiB", "weights", "grads", "states", "gather", "a GPU", "CPU\nmemory", "disk"]
    # The bytes depend on copies of float32 weights: they are equal for all setups with them, and
    # without.
    by_sizes: dict[tuple[int, ...], list[str]] = {}
    for name in setups:
        sizes = tuple(
            by_place[name, policy].activations for policy in policies if (name, policy) in by_place
        )
        by_sizes.setdefault(sizes, []).append(name)
    activations: list[_Line] = []
    for names in by_sizes.values():
        cells_of_policies = [by_place.get((names[0], policy)) for policy in policies]
        cells = [format_gib(row.activations if row is not None else 0) for row in cells_of_policies]
        label = names[0] if len(names) == 1 else f"{len(names)} others" if activations else "all"
        activations.append(([label, *cells], ""))
    largest: list[_Line] = []
    for name in setups:
        cells_of_policies = [by_place.get((name, policy)) for policy in policies]
        largest.append(([name, *map(_largest, cells_of_policies)], ""))
    columns = [
        policy.replace("checkpoint", "check-\npoint")
        .replace("-recompute", "-\nrecom-\npute")
        .replace("+offload", "+off-\nload")
        for policy in (policy.replace("+", "\n+") for policy in policies)
    ]
    images = rows[0].batch
    return [
        _table(head, states, whole_names=True),
        f"Activations of {images} images, GiB a GPU:",
        _table(["", *columns], activations, whole_names=True),
        f"Largest batch a GPU (in brackets where {images} do not fit):",
        _table(["", *columns], largest, whole_names=True),
    ]


def _setup(estimate: Estimate) -> str:
    """A setup in words."""
    suffixes = {"none": "", "cpu": " CPU", "optimizer": " CPU states", "nvme": " NVMe"}
    return estimate.strategy + suffixes[estimate.offload]


def _largest(estimate: Estimate | None) -> str:
    """The largest batch as text; in brackets if the requested batch does not fit."""
    if estimate is None:
        return "-"
    if estimate.reason == "CPU memory":
        return "memory"
    size = estimate.largest_batch
    text = (
        f"{size:,}" if size < 1e4 else f"{size / 1e3:.0f}k" if size < 1e6 else f"{size / 1e6:.0f}M"
    )
    return text if estimate.fits else f"({text})"
