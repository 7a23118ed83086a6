"""The report of an evaluation: a terminal table, JSON, pictures, and one HTML page.

The page loads nothing from a network. On a phone, each row becomes a card. In print, the page is
black on white and no row is cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mesa_train.report import figures
from mesa_train.report.charts import as_svg
from mesa_train.utils.records import group_by

from .tasks import Row


def shown(row: Row) -> str:
    """The value of a row as text."""
    if row.value is None:
        return "not measured"
    return f"{100 * row.value:.1f} %" if row.share else f"{row.value:.3f}"


def table(rows: Sequence[Row]) -> Any:
    """A rich table."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "data", "metric", "value", "note"):
        made.add_column(heading, justify="right" if heading == "value" else "left")
    for row in rows:
        made.add_row(row.task, row.data, row.metric, shown(row), row.note)
    return made


def write(
    folder: Path, rows: Sequence[Row], plots: Mapping[str, Any], about: Mapping[str, Any]
) -> list[Path]:
    """Write report.json, report.html and plots.png.

    Args:
        folder: of the report; made if it is missing.
        rows: of all tasks.
        plots: values for the charts, from `Evaluation.plots`.
        about: model, weights, images, command, versions and more, for the head of the page.
    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    content = {"about": dict(about), "rows": [vars(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    canvas = draw(plots, str(about["model"]))
    svgs, files = [], [path]
    if canvas is not None:
        figures.save(canvas, folder / "plots.png")
        files.append(folder / "plots.png")
        # One picture for each chart: they stand below each other on a phone.
        for number, (name, values) in enumerate(plots.items()):
            svgs.append(as_svg(draw({name: values}, ""), f"plot{number}", f"Chart of {name}"))
    files.append(folder / "report.html")
    files[-1].write_text(html(rows, svgs, about), encoding="utf-8")
    return files


def html(rows: Sequence[Row], svgs: Sequence[str], about: Mapping[str, Any]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    plain = [{**vars(row), "shown": shown(row)} for row in rows]
    source = resources.files("mesa_train.training.evaluation.suite").joinpath("report.html.j2")
    style = resources.files("mesa_train.report").joinpath("report.css").read_text(encoding="utf-8")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        model=about["model"],
        facts={key: value for key, value in about.items() if key != "model"},
        tasks={task: group for (task,), group in group_by(plain, "task").items()},
        svgs=svgs,
        style=style,
    )


def draw(plots: Mapping[str, Any], title: str) -> Any:
    """The charts side by side; None if there is nothing to draw, or matplotlib is missing."""
    if not plots:
        return None
    try:
        canvas, axes = figures.figure(len(plots), title)
    except ImportError:
        return None
    for axis, (name, values) in zip(axes, plots.items(), strict=True):
        axis.set_ylabel("accuracy (%)")
        if name == "reliability":
            at = [100 * v for v in values["confidence"]]
            axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
            axis.scatter(
                at,
                [100 * v for v in values["accuracy"]],
                s=[8 + 200 * v for v in values["share"]],
                color="#0072B2",
                alpha=0.7,
            )
            axis.set_xlabel("confidence (%)")
        else:
            x, y = values
            scale = 100 if name == "selective" else 1
            axis.plot([scale * v for v in x], [100 * v for v in y], marker="o", color="#0072B2")
            axis.set_xlabel(
                {"few-shot": "images of each class", "selective": "coverage (%)"}.get(name, "k")
            )
        axis.set_title(name, fontsize=10)
    return canvas
