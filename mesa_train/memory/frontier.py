"""The frontier of a planner: what every budget costs in time and error, with rivals beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mesa_train.memory.charts import FAMILIES, INK, family, inked, label_points
from mesa_train.training.plots import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mesa_train.memory.plans import Plan


def draw(plans: Sequence[Plan], rivals: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Peak of the step against time, or against gradient error where nothing was timed.

    plans: as `Planner.frontier` gives them. rivals: rows of a comparison of the same model and
    batch; their times are set against its "plain", so that another machine or load cancels out.
    """
    timed = all(p.prediction.time_ratio is not None for p in plans)
    canvas, (axis,) = figure(1, "")
    canvas.set_size_inches(7.6, 5.0)
    ordered = sorted(plans, key=lambda p: p.prediction.peak_bytes)
    xs = [p.prediction.peak_bytes / 2**20 for p in ordered]
    ys = [
        (p.prediction.time_ratio or 0.0) if timed else 100 * p.prediction.gradient_error
        for p in ordered
    ]
    blue = FAMILIES["mesa_train"]
    axis.plot(xs, ys, color=blue, linewidth=1.6, zorder=2)
    axis.scatter(xs, ys, color=blue, s=26, zorder=3, label="planned")
    names = [f"{100 * p.prediction.gradient_error:.2g} % error" if timed else "" for p in ordered]
    points = list(zip(xs, ys, strict=True))
    plain = next((r for r in rivals if r["method"] == "plain"), None)
    for row in rivals:
        if not row.get("peak_bytes") or "adamw8bit" in row["method"] or row["method"] == "bf16":
            continue  # Other weights or states: not the same budget.
        if timed and (plain is None or not row.get("step_ms")):
            continue
        y = (
            row["step_ms"] / plain["step_ms"]
            if timed and plain
            else 100 * (row.get("gradient_error") or 0)
        )
        x = row["peak_bytes"] / 2**20
        axis.scatter([x], [y], color=FAMILIES[family(row["method"])], s=26, marker="D", zorder=3)
        points.append((x, y))
        names.append(row["method"])
    axis.margins(x=0.14, y=0.16)
    axis.set_xlabel("peak of the step, MiB")
    axis.set_ylabel("step time, plain = 1" if timed else "gradient error, %")
    axis.set_title(title, fontsize=10, loc="left")
    label_points(canvas, axis, names, points, list(zip(xs, ys, strict=True)))
    if timed:
        axis.axhline(1.0, color=INK, linewidth=0.6, alpha=0.4)
    return inked(canvas)
