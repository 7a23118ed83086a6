"""Draw the frontier of a planner: the time and error of every budget, with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .charts import COARSE, FAMILIES, INK, apply_ink, coarse, family, label_points, set_title
from .figures import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mesa_train.planner.plan import Plan

Row = Mapping[str, Any]
_PLANNED, _BASELINE = 34, 30


def draw(plans: Sequence[Plan], baselines: Sequence[Row], title: str) -> Figure:
    """Draw the peak of the step against time, or against gradient error if nothing was timed.

    Args:
        plans: the plans of `Planner.frontier`.
        baselines: rows of a comparison of the same model and batch. Their times are divided by the
            time of its "plain", so that another machine or load cancels out.
        title: title of the chart.
    """
    timed = all(plan.prediction.time_ratio is not None for plan in plans)
    canvas, (axis,) = figure(1, "")
    canvas.set_size_inches(7.6, 5.0)
    ordered = sorted(plans, key=lambda plan: plan.prediction.peak_bytes)
    errors = [plan.prediction.gradient_error for plan in ordered]
    xs = [plan.prediction.peak_bytes / 2**20 for plan in ordered]
    ys = [
        (plan.prediction.time_ratio or 0.0) if timed else 100 * plan.prediction.gradient_error
        for plan in ordered
    ]
    blue = FAMILIES["mesa_train"]
    axis.plot(xs, ys, color=blue, linewidth=1.6, zorder=2)
    face_colours = ["white" if timed and error > COARSE else blue for error in errors]
    axis.scatter(
        xs, ys, facecolors=face_colours, edgecolors=blue, linewidths=1.6, s=_PLANNED, zorder=3
    )
    label = "planned: predicted, with gradient error" if timed else "planned: predicted"
    axis.plot([], [], color=blue, linewidth=1.6, marker="o", label=label)
    points, names = (
        [*zip(xs, ys, strict=True)],
        [f"{error:.1%}" if timed else "" for error in errors],
    )
    comparable = _comparable(baselines, timed)
    plain = next((row for row, _, _ in comparable if row["method"] == "plain"), None)
    for row, x, y in comparable:
        colour = FAMILIES[family(row["method"])]
        hollow = timed and coarse(row)
        axis.scatter(
            [x], [y], marker="D", s=_BASELINE, zorder=3,
            facecolors="white" if hollow else colour, edgecolors=colour, linewidths=1.4,
        )  # fmt: skip
        points.append((x, y))
        names.append(row["method"])
    axis.margins(x=0.14, y=0.16)
    axis.set_xlabel("peak of the step with weights and optimizer states, MiB")
    axis.set_ylabel("step time, plain = 1" if timed else "gradient error, %")
    set_title(axis, title)
    _legend(canvas, axis, [family(row["method"]) for row, _, _ in comparable], timed)
    label_points(canvas, axis, names, points, points[: len(plans)])
    if timed and (plain is not None or not comparable):
        axis.axhline(1.0, color=INK, linewidth=0.6, alpha=0.4)
    return apply_ink(canvas)


def _comparable(baselines: Sequence[Row], timed: bool) -> list[tuple[Row, float, float]]:
    """(row, peak in MiB, time or error) of the baselines with comparable budgets.

    Methods with other weights or other optimizer states have another budget and are left out.
    """
    plain: Row = next((row for row in baselines if row["method"] == "plain"), {})
    points = []
    for row in baselines:
        if not row.get("peak_bytes") or "adamw8bit" in row["method"] or row["method"] == "bf16":
            continue
        if timed and not (plain.get("step_ms") and row.get("step_ms")):
            continue
        error = 100 * (row.get("gradient_error") or 0.0)
        y = row["step_ms"] / plain["step_ms"] if timed else error
        points.append((row, row["peak_bytes"] / 2**20, y))
    return points


def _legend(canvas: Figure, axis: Axes, families: Sequence[str], timed: bool) -> None:
    """Add the legend below the chart."""
    for name in FAMILIES:
        if name in families:
            axis.scatter(
                [], [], color=FAMILIES[name], s=_BASELINE, marker="D", label=f"{name}, measured"
            )
    if timed:
        label = f"hollow: gradient error over {COARSE:.0%}"
        axis.scatter(
            [], [], facecolors="none", edgecolors=INK, s=_BASELINE, marker="D", label=label
        )
    canvas.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=3)
