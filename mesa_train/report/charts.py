"""Draw the charts of a comparison: memory against time, and saved bytes by operator.

matplotlib draws PNG files, and SVG for the report. Text and axes of the SVG have the page's colour.
Without matplotlib all functions raise an ImportError that names the extra.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesa_train.methods.spec import ADAMW8BIT
from mesa_train.utils.formatting import format_bytes

from .figures import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's colours, which differ for any colour vision; by family of methods.
FAMILIES = {
    "plain": "#7A7A7A",
    "mesa_train": "#0072B2",
    "checkpointing": "#D55E00",
    "torch.compile": "#009E73",
    "other": "#CC79A7",
}
_OPERATORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# A placeholder: the writer of the SVG replaces this colour by the page's text colour.
INK = "#010203"
# Operators with a colour of their own in the bars; the others are one part.
_MAX_OPERATORS = 7
# Methods with a larger gradient error are drawn hollow.
COARSE = 0.05


def check() -> None:
    """Raise an ImportError that names the extra if matplotlib is missing."""
    figure(1, "")


def family(method: str) -> str:
    """Return the family of a method, a key of `FAMILIES`."""
    if method.startswith("compile"):
        return "torch.compile"
    base = method.removesuffix(f"+{ADAMW8BIT}")
    if base in ("plain", "float32", "bf16"):
        return "plain"
    if base == "checkpoint":
        return "checkpointing"
    mesa = base.startswith("mesa") or base in ("paper", "lossless") or base.endswith("ml")
    return "mesa_train" if mesa or base.startswith("plan") else "other"


def coarse(row: Row) -> bool:
    """True if the gradient error of a row is above `COARSE`."""
    return (row.get("gradient_error") or 0.0) > COARSE


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points for which no other point is smaller in both coordinates.

    Args:
        points: (x, y) pairs.

    Returns:
        Indices of these points, in the order of x.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def tradeoff(rows: Sequence[Row], title: str) -> Figure | None:
    """Draw saved bytes against step time, with one labelled point for each method.

    Args:
        rows: rows of a comparison.
        title: title of the chart.

    Returns:
        The figure; None if fewer than two rows have both values.
    """
    shown = [row for row in rows if row.get("saved_bytes") and row.get("step_ms")]
    if len(shown) < 2:
        return None
    canvas, (axis,) = figure(1, "")
    canvas.set_size_inches(7.6, 5.0)
    points = [(row["saved_bytes"] / 2**20, row["step_ms"]) for row in shown]
    front = [points[i] for i in pareto(points)]
    for name, colour in FAMILIES.items():
        of_family = [
            (p, row) for p, row in zip(points, shown, strict=True) if family(row["method"]) == name
        ]
        if of_family:
            xs, ys = zip(*[p for p, _ in of_family], strict=True)
            face_colours = ["none" if coarse(row) else colour for _, row in of_family]
            axis.scatter(
                xs, ys, facecolors=face_colours, edgecolors=colour, linewidths=1.6, s=38, zorder=3
            )
            axis.scatter([], [], color=colour, s=38, label=name)
    if any(coarse(row) for row in shown):
        label = f"gradient error over {COARSE:.0%}"
        axis.scatter([], [], facecolors="none", edgecolors=INK, linewidths=1.6, s=38, label=label)
    axis.plot(
        *zip(*front, strict=True), color=INK, alpha=0.45, linewidth=1.2, linestyle="--", zorder=1,
        label="no method is better in both",
    )  # fmt: skip
    axis.set_xscale("log")
    _plain_ticks(axis, [x for x, _ in points])
    axis.margins(x=0.16, y=0.14)
    axis.set_xlabel("saved for the backward, MiB (log scale)")
    axis.set_ylabel("training step, ms")
    set_title(axis, title)
    canvas.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=5)
    label_points(canvas, axis, [row["method"] for row in shown], points, front)
    return apply_ink(canvas)


def where(rows: Sequence[Row], title: str) -> Figure | None:
    """Draw the saved bytes by operator as stacked bars, with one bar for each method.

    Args:
        rows: rows of a comparison.
        title: title of the chart.

    Returns:
        The figure; None if no row has bytes by operator.
    """
    shown = [row for row in rows if row.get("by_operator")]
    if not shown:
        return None
    totals: dict[str, int] = {}
    for row in shown:
        for operator, size in row["by_operator"].items():
            totals[operator] = totals.get(operator, 0) + size
    undivided = {"compiled graph", "copies in CPU memory"}
    largest = sorted(
        (operator for operator in totals if operator not in undivided),
        key=lambda operator: -totals[operator],
    )[:_MAX_OPERATORS]
    canvas, (axis,) = figure(1, "")
    canvas.set_size_inches(7.6, 1.4 + 0.32 * len(shown))
    offsets = [0.0] * len(shown)
    parts = [
        (operator, [row["by_operator"].get(operator, 0) for row in shown]) for operator in largest
    ]
    rest = [
        sum(
            size
            for operator, size in row["by_operator"].items()
            if operator not in largest and operator not in undivided
        )
        for row in shown
    ]
    opaque = [sum(row["by_operator"].get(operator, 0) for operator in undivided) for row in shown]
    parts += [("other operators", rest), ("operator unknown", opaque)]
    colours = [*_OPERATORS[: len(largest)], "#999999", "#C8C8C8"]
    names = [row["method"] for row in shown]
    for (operator, sizes), colour in zip(parts, colours, strict=True):
        if any(sizes):
            widths = [size / 2**20 for size in sizes]
            axis.barh(names, widths, left=offsets, color=colour, height=0.68, label=operator)
            offsets = [a + b for a, b in zip(offsets, widths, strict=True)]
    for position, row in enumerate(shown):
        axis.annotate(
            format_bytes(row["saved_bytes"]),
            (offsets[position], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_xlim(0, 1.16 * max(offsets))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("saved for the backward, MiB")
    set_title(axis, title)
    canvas.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=4)
    axis.set_axisbelow(True)
    return apply_ink(canvas)


def set_title(axis: Axes, title: str) -> None:
    """Set the title of a panel, wrapped to lines of 92 characters."""
    if title:
        axis.set_title(textwrap.fill(title, 92), fontsize=10, loc="left")


def save_png(canvas: Figure, path: Path) -> None:
    """Write a figure as PNG on white, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, facecolor="white")


def as_svg(canvas: Figure, name: str, description: str) -> str:
    """Return a figure as an `<svg>` element for a page: transparent, in the page's text colour.

    Args:
        canvas: the figure.
        name: prefix of the element's ids, so that the ids of two charts differ.
        description: text alternative of the chart.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="(?!p[0-9a-f]{10})([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#(?!p[0-9a-f]{10})([^"]*)"', rf'xlink:href="#{name}-\1"', text)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace(INK, "currentColor")
    head, _, rest = text.partition(">")
    return f'{head} role="img" aria-label="{html.escape(description)}">{rest}'


def label_points(
    canvas: Figure,
    axis: Axes,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
) -> None:
    """Write a name beside each point, without overlap; a line joins a distant name to its point.

    Args:
        canvas: the figure.
        axis: the panel.
        names: the name of each point.
        points: (x, y) of the points, in the units of the data.
        front: corners of the line of the Pareto front, which the names avoid.
    """
    canvas.draw_without_rendering()
    renderer = canvas.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = [tuple(axis.transData.transform(point)) for point in points]
    texts = [axis.text(0, 0, name, fontsize=8, zorder=4) for name in names]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(extent.width + 4, extent.height + 3) for extent in extents]
    box = axis.get_window_extent(renderer)
    front_pixels = [tuple(axis.transData.transform(point)) for point in front]
    corners = place(pixels, sizes, (box.x0, box.y0, box.x1, box.y1), gap=9, lines=front_pixels)
    to_data = axis.transData.inverted()
    for text, pixel, size, corner in zip(texts, pixels, sizes, corners, strict=True):
        text.set_position(tuple(to_data.transform((corner[0] + 2, corner[1] + 3))))
        nearest = [
            min(max(p, low), low + length)
            for p, low, length in zip(pixel, corner, size, strict=True)
        ]
        if sum((a - b) ** 2 for a, b in zip(pixel, nearest, strict=True)) > 16**2:
            ends = [to_data.transform(end) for end in (pixel, nearest)]
            axis.plot(*zip(*ends, strict=True), color=INK, alpha=0.4, linewidth=0.7, zorder=1)


def _plain_ticks(axis: Axes, values: Sequence[float]) -> None:
    """Set ticks at 1, 2 and 5 times powers of ten, with labels in plain digits."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = [m * 10**e for e in range(-3, 8) for m in (1, 2, 5)]
    inside = [t for t in ticks if min(values) / 2.1 <= t <= 2.1 * max(values)]
    axis.xaxis.set_major_locator(FixedLocator(inside))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def apply_ink(canvas: Figure) -> Figure:
    """Draw text, axes and grid in `INK`, which the SVG replaces by the page's colour."""
    from matplotlib.text import Text

    for text in canvas.findobj(Text):
        text.set_color(INK)
    for axis in canvas.axes:
        for spine in axis.spines.values():
            spine.set_edgecolor(INK)
        axis.tick_params(colors=INK)
        for line in (axis.xaxis, axis.yaxis):
            for grid in line.get_gridlines():
                grid.set_color(INK)
                grid.set_alpha(0.15)
    return canvas


Box = tuple[float, float, float, float]


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    gap: float = 6.0,
    lines: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float]]:
    """Place labels beside points without overlap.

    Points with the most neighbours come first. For each point, positions on rings around it are
    tried, and the label gets the position with the least overlap.

    Args:
        points: (x, y) of the points, for example in pixels.
        sizes: (width, height) of the labels, in the same unit.
        bounds: (left, bottom, right, top) of the area for the labels.
        gap: distance between a point and its label.
        lines: corners of a line that the labels avoid.

    Returns:
        (x, y) of the lower left corner of each label.
    """
    half = 0.85 * gap
    dots = [(x - half, y - half, x + half, y + half) for x, y in points]
    path = [(x - 2, y - 2, x + 2, y + 2) for x, y in _along(lines, 4.0)]
    placed: list[Box] = []
    corners: dict[int, tuple[float, float]] = {}
    neighbours = [sum(math.dist(p, q) < 12 * gap for q in points) for p in points]
    for index in sorted(range(len(points)), key=lambda i: -neighbours[i]):
        (x, y), (width, height) = points[index], sizes[index]
        best, lowest_cost = (x + gap, y - height / 2), math.inf
        for ring, angle in itertools.product(range(9), range(16)):
            direction = 2 * math.pi * angle / 16
            radius = gap + ring * 0.9 * height
            cx, cy = x + radius * math.cos(direction), y + radius * math.sin(direction)
            # The label's nearest edge touches the ring.
            left = cx - width / 2 + math.cos(direction) * width / 2
            bottom = cy - height / 2 + math.sin(direction) * height / 2
            box = (left, bottom, left + width, bottom + height)
            cost = sum(_overlap(box, other) for other in placed)
            cost += sum(_overlap(box, dot) for dot in dots) + 4 * _outside(box, bounds)
            cost += 0.5 * sum(_overlap(box, dot) for dot in path)
            cost += 0.02 * ring * height
            if cost < lowest_cost:
                best, lowest_cost = (left, bottom), cost
        corners[index] = best
        placed.append((*best, best[0] + width, best[1] + height))
    return [corners[index] for index in range(len(points))]


def _along(corners: Sequence[tuple[float, float]], step: float) -> Iterator[tuple[float, float]]:
    """Yield points on a line through `corners`, at most `step` apart."""
    for (x, y), (u, v) in itertools.pairwise(corners):
        count = max(1, math.ceil(math.dist((x, y), (u, v)) / step))
        for i in range(count + 1):
            yield x + (u - x) * i / count, y + (v - y) * i / count


def _overlap(a: Box, b: Box) -> float:
    """The common area of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Box, bounds: Box) -> float:
    """The area of a box outside of `bounds`."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, bounds)
