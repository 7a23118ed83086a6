"""The report of an evaluation of one or several models: terminal table, JSON, pictures, HTML page.

The page loads nothing from a network. On a phone, each row becomes a card. In print, the page is
black on white and no row is cut. Several models share one table, with a column for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from mesa_train.report import figures
from mesa_train.report.charts import as_svg
from mesa_train.utils.records import group_by

from .tasks import Row


@dataclass
class Report:
    """The evaluation of one model.

    Attributes:
        about: "model", weights, images, command, versions and more.
        rows: of all tasks.
        plots: values for the charts, from `Evaluation.plots`.
    """

    about: Mapping[str, Any]
    rows: Sequence[Row]
    plots: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Line:
    """A metric and its values.

    Attributes:
        task: name of the task.
        data: name of the images.
        metric: name of the metric.
        values: by label, as text; "" for a model without this row.
        note: of all models that have the row; the label comes first if notes differ.
    """

    task: str
    data: str
    metric: str
    values: dict[str, str]
    note: str


def shown(row: Row) -> str:
    """The value of a row as text."""
    if row.value is None:
        return "not measured"
    return f"{100 * row.value:.1f} %" if row.share else f"{row.value:.3f}"


def labels(reports: Sequence[Report]) -> list[str]:
    """A name for each report: the model, and its weights where two have one model."""
    names = [str(report.about["model"]) for report in reports]
    made = [
        name if names.count(name) == 1 else f"{name}, {report.about.get('weights', i + 1)}"
        for i, (name, report) in enumerate(zip(names, reports, strict=True))
    ]
    return [
        name if made.count(name) == 1 else f"{name} ({made[: i + 1].count(name)})"
        for i, name in enumerate(made)
    ]


def lines(reports: Sequence[Report]) -> list[Line]:
    """The rows of all reports, tasks in the order of the first report that has them."""
    names = labels(reports)
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for name, report in zip(names, reports, strict=True):
        for row in report.rows:
            found.setdefault((row.task, row.data, row.metric), {})[name] = row
    made = []
    for (task, data, metric), rows in found.items():
        values = {name: shown(rows[name]) if name in rows else "" for name in names}
        notes = {name: row.note for name, row in rows.items() if row.note}
        same = len(set(notes.values())) == 1 and len(notes) == len(rows)
        note = (
            next(iter(notes.values()))
            if same
            else "; ".join(f"{name}: {text}" for name, text in notes.items())
        )
        made.append(Line(task, data, metric, values, note))
    # A row that the first model lacks follows the other rows of its task.
    order = {task: place for place, task in enumerate(dict.fromkeys(line.task for line in made))}
    return sorted(made, key=lambda line: order[line.task])


def table(reports: Sequence[Report]) -> Any:
    """A rich table. Of several models it has the notes of what was not measured alone."""
    from rich import box
    from rich.table import Table

    names, found = labels(reports), lines(reports)
    short = shortened([line.data for line in found] + names)
    columns = [short[name] for name in names] if len(names) > 1 else ["value"]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "data", "metric"):
        made.add_column(heading, overflow="fold")
    for heading in columns:
        made.add_column(heading, justify="right", overflow="fold")
    made.add_column("note", overflow="fold")
    for line in found:
        texts = list(line.values.values())
        note = line.note if len(names) == 1 or "not measured" in texts else ""
        made.add_row(line.task, short[line.data], line.metric, *texts, note)
    return made


def shortened(names: Sequence[str], longest: int = 24) -> dict[str, str]:
    """A short text for each name, for a terminal. A long path keeps its last parts.

    Args:
        names: of images and models.
        longest: a name of more characters is a path, if it has a slash. It keeps as many of its last
            parts as it needs to differ from the other names.
    """
    different = list(dict.fromkeys(names))
    made = {}
    for name in different:
        parts, own = name.split("/"), name
        others = [other for other in different if other != name]
        if len(name) > longest:
            for count in range(1, len(parts)):
                end = "/".join(parts[-count:])
                if end and not any(other.endswith(f"/{end}") for other in others):
                    own = f"…/{end}"
                    break
        made[name] = own
    return made


def write(folder: Path, reports: Sequence[Report]) -> list[Path]:
    """Write report.json, report.html and plots.png.

    Args:
        folder: of the report; made if it is missing.
        reports: one for each model.
    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    contents = [
        {"about": dict(report.about), "rows": [vars(row) for row in report.rows]}
        for report in reports
    ]
    content = contents[0] if len(contents) == 1 else {"models": contents}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    plots = dict(zip(labels(reports), (report.plots for report in reports), strict=True))
    charts = list(dict.fromkeys(chart for values in plots.values() for chart in values))
    canvas = draw(plots, charts, " and ".join(plots))
    svgs, files = [], [path]
    if canvas is not None:
        figures.save(canvas, folder / "plots.png")
        files.append(folder / "plots.png")
        # One picture for each chart: they stand below each other on a phone.
        for number, chart in enumerate(charts):
            svgs.append(as_svg(draw(plots, [chart], ""), f"plot{number}", f"Chart of {chart}"))
    files.append(folder / "report.html")
    files[-1].write_text(html(reports, svgs), encoding="utf-8")
    return files


def html(reports: Sequence[Report], svgs: Sequence[str]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    names, first = labels(reports), reports[0].about
    facts = {
        key: value
        for key, value in first.items()
        if key != "model" and all(report.about.get(key) == value for report in reports)
    }
    # Facts in which the models differ; of one model there are none.
    own = {
        name: {k: v for k, v in report.about.items() if k not in facts and k != "model"}
        for name, report in zip(names, reports, strict=True)
    }
    source = resources.files("mesa_train.training.evaluation.suite").joinpath("report.html.j2")
    style = resources.files("mesa_train.report").joinpath("report.css").read_text(encoding="utf-8")
    plain = [vars(line) for line in lines(reports)]
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        names=names,
        facts=facts,
        own=own,
        tasks={task: group for (task,), group in group_by(plain, "task").items()},
        svgs=svgs,
        style=style,
    )


def draw(plots: Mapping[str, Mapping[str, Any]], charts: Sequence[str], title: str) -> Any:
    """Charts side by side; None if there is nothing to draw, or matplotlib is missing.

    Args:
        plots: values by label and name of the chart.
        charts: names of the charts.
        title: of the figure.
    """
    if not charts:
        return None
    try:
        canvas, axes = figures.figure(len(charts), title)
    except ImportError:
        return None
    palette = figures.colours(list(plots))
    for axis, chart in zip(axes, charts, strict=True):
        axis.set_ylabel("accuracy (%)")
        axis.set_title(chart, fontsize=10)
        if chart == "reliability":
            axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
            axis.set_xlabel("confidence (%)")
        else:
            axis.set_xlabel(
                {"few-shot": "images of each class", "selective": "coverage (%)"}.get(chart, "k")
            )
        for name in [name for name in plots if chart in plots[name]]:
            _draw(axis, chart, plots[name][chart], palette[name], name)
        if len(plots) > 1:
            axis.legend(frameon=False, fontsize=8)
    return canvas


def _draw(axis: Any, chart: str, values: Any, colour: str, label: str) -> None:
    """The points of one model in a chart."""
    if chart == "reliability":
        axis.scatter(
            [100 * v for v in values["confidence"]],
            [100 * v for v in values["accuracy"]],
            s=[8 + 200 * v for v in values["share"]],
            color=colour,
            alpha=0.7,
            label=label,
        )
        return
    x, y = values
    scale = 100 if chart == "selective" else 1
    axis.plot([scale * v for v in x], [100 * v for v in y], marker="o", color=colour, label=label)
