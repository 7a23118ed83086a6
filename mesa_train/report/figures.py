"""Draw training curves from recorded rows: a bold mean over seeds, a thin line for each seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mesa_train.utils.records import Row, group_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for any colour vision, and a brown; plain is black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5C3A21")
_PLAIN = "#000000"


def figure(columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """Make a figure with one row of panels.

    Args:
        columns: number of panels.
        title: title of the figure.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise ImportError(
            "drawing charts needs matplotlib: pip install 'mesa_train[report]'"
        ) from error
    canvas = MatplotlibFigure(figsize=(4.6 * columns, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontsize=11)
    axes = canvas.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return canvas, list(axes)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every run name, the same for the same list; "plain" is black."""
    others = [name for name in names if name != "plain"]
    chosen = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    return {"plain": _PLAIN, **chosen} if "plain" in names else chosen


def curves(axis: Axes, rows: Sequence[Row], value: str, label: str, scale: float = 1.0) -> None:
    """Draw `value` over epochs: a bold line for the mean of each name, thin lines for its seeds.

    Lines that coincide stay visible, because each name's line is thinner than the line below it.

    Args:
        axis: the panel.
        rows: rows with the keys name, seed, epoch and `value`.
        value: key of the values.
        label: title of the panel.
        scale: factor on the values.
    """
    from matplotlib.ticker import MaxNLocator

    by_name = group_by(rows, "name")
    palette = colours([name for (name,) in by_name])
    for order, ((name,), named_rows) in enumerate(by_name.items()):
        colour = palette[name]
        seeds = group_by(named_rows, "seed")
        for run in seeds.values():
            points = sorted((row["epoch"], scale * row[value]) for row in run)
            if len(seeds) > 1:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        means = [
            (epoch, scale * statistics.fmean(row[value] for row in epoch_rows))
            for (epoch,), epoch_rows in sorted(group_by(named_rows, "epoch").items())
            if len(epoch_rows) == len(seeds)
        ]
        axis.plot(
            *zip(*means, strict=True),
            color=colour,
            linewidth=1.4 + 0.9 * (len(by_name) - 1 - order),
            solid_capstyle="butt",
            marker="o" if len(means) == 1 else None,
            label=name,
            zorder=3 + order,
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_title(label, fontsize=10)
    axis.legend(frameon=False, fontsize=9)


def bars(axis: Axes, values: Mapping[str, float], label: str, unit: str) -> None:
    """Draw horizontal bars by name, each with its value and its ratio to the first.

    Args:
        axis: the panel.
        values: value of each name.
        label: title of the panel.
        unit: unit of the values.
    """
    palette = colours(list(values))
    names = list(values)
    first = values[names[0]]
    axis.barh(names, list(values.values()), color=[palette[name] for name in names], height=0.55)
    for position, name in enumerate(names):
        ratio = "" if position == 0 else f"  ({first / values[name]:.2f}x less)"
        axis.annotate(
            f"{values[name]:,.1f} {unit}{ratio}",
            (values[name], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_xlim(0, 1.45 * max(values.values()))
    axis.set_xlabel(unit)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_title(label, fontsize=10)


def dots(axis: Axes, rows: Sequence[Row], value: str, label: str, scale: float = 1.0) -> None:
    """Draw one dot for each seed in a column for each name, and a short line at each name's mean.

    Lines join the dots of one seed across names. They show which part of a difference comes from
    the seed.

    Args:
        axis: the panel.
        rows: rows with the keys name, seed and `value`.
        value: key of the values.
        label: title of the panel.
        scale: factor on the values.
    """
    by_name = group_by(rows, "name")
    names = [name for (name,) in by_name]
    palette = colours(names)
    for group in group_by(rows, "seed").values():
        points = [(names.index(row["name"]), scale * row[value]) for row in group]
        axis.plot(*zip(*sorted(points), strict=True), color="#999999", linewidth=0.7, zorder=1)
    for position, ((name,), group) in enumerate(by_name.items()):
        values = [scale * row[value] for row in group]
        axis.scatter([position] * len(values), values, color=palette[name], s=22, zorder=2)
        axis.hlines(statistics.fmean(values), position - 0.2, position + 0.2, color=palette[name])
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(axis="x", visible=False)
    axis.set_title(label, fontsize=10)


def save(canvas: Figure, path: Path) -> None:
    """Write the picture and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)
