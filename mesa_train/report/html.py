"""Write the report of a comparison as one HTML file: charts, sortable tables, module tree, command.

The layout is the Jinja2 template `report.html.j2`; this file computes its values. The page loads
nothing from a network. It has a light and a dark style. On a phone, tables and charts scroll
sideways in their frames. In print all parts are open. The template escapes every text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mesa_train.measure.module_tree import grow
from mesa_train.utils.formatting import describe, format_bytes, format_ratio

from .charts import as_svg, tradeoff, where
from .columns import ERROR_MARGIN, TIME_MARGIN, cell, notes, with_ratios, worse_than_plain

Row = Mapping[str, Any]
# The text, the number that a click on the heading sorts by, and "best", "worse" or "".
_Cell = tuple[str, Any, str]
# key, heading, explanation.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("saved_bytes", "saved for the backward", "each storage once, without parameters and buffers"),
    ("saved_ratio", "less than plain", "plain's saved bytes divided by this method's"),
    ("offloaded_bytes", "in CPU memory", "offloaded between forward and backward"),
    ("peak_bytes", "peak of the step", "most bytes at once, with weights and optimizer states"),
    ("resident_bytes", "resident set", "highest of the process, beyond that before the step"),
    ("weight_bytes", "weights", "parameters and buffers"),
    ("gradient_bytes", "gradients", "after the backward"),
    ("optimizer_bytes", "optimizer", "AdamW's two moments"),
    ("step_ms", "step, ms", "forward, backward and optimizer; median and quartiles"),
    ("step_ratio", "step vs. plain", "this method's median divided by plain's"),
    ("images_per_s", "images/s", ""),
    ("gradient_error", "gradient error", "relative L2 distance from the plain float32 gradient"),
    ("gradient_cosine", "cosine", "of the angle to the plain float32 gradient"),
    ("largest_batch", "largest batch", "that fits --memory"),
)
_TREE_METHODS = ("plain", "mesa8", "mesa6", "mesa4", "mesa8-recompute", "checkpoint")


def write_report(path: Path, rows: Sequence[Row], setting: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        rows: the rows that `compare.scheduler.measure` yields.
        setting: model, shapes, dtype, device and command of the comparison; optional are weights,
            device_name, threads, versions, commit and date.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(rows, setting), encoding="utf-8")


def render(rows: Sequence[Row], setting: Mapping[str, Any]) -> str:
    """Return the page as HTML text.

    Args:
        rows: as for `write_report`.
        setting: as for `write_report`.
    """
    from jinja2 import Environment, StrictUndefined

    rows = with_ratios(rows)
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    sizes = {row["method"]: row["by_module"] for row in rows if row.get("by_module")}
    tree_methods = [m for m in _TREE_METHODS if m in sizes] or list(sizes)[:4]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.globals.update(format_bytes=format_bytes, format_ratio=format_ratio)
    return environment.from_string(_asset("report.html.j2")).render(
        model=setting["model"],
        summary=summary(rows),
        inputs=_inputs(setting),
        columns=columns,
        rows=_table(rows, [key for key, *_ in columns]),
        has_plain=any(row["method"] == "plain" for row in rows),
        time_margin=f"{TIME_MARGIN - 1:.0%}",
        error_margin=f"{ERROR_MARGIN:g}",
        notes=notes(rows),
        charts=_charts(rows, str(setting["model"])),
        tree_methods=tree_methods,
        tree=grow([sizes[method] for method in tree_methods]),
        caveats=_caveats(rows),
        facts=_facts(setting, rows),
        style=_asset("report.css"),
        script=_asset("report.js"),
    )


def summary(rows: Sequence[Row]) -> str:
    """Describe the costs of mesa8, and of checkpointing, in one or two sentences."""
    mesa8_rows = [row for row in rows if row["method"] == "mesa8" and row.get("saved_ratio")]
    if not mesa8_rows:
        return f"{len(rows)} methods compared."
    row = mesa8_rows[0]
    sentence = f"mesa8 saves {row['saved_ratio']:.2f} times fewer bytes than plain"
    if row.get("step_ratio"):
        sentence += f" at {row['step_ratio']:.2f} times its step time"
    plain: Row = next((row for row in rows if row["method"] == "plain"), {})
    if row.get("gradient_error") is not None:
        sentence += f", with a gradient error of {row['gradient_error']:.2%}"
        if plain.get("gradient_error") is not None:
            sentence += f" (plain: {plain['gradient_error']:.2%})"
    sentence += "."
    baseline: Row = next((row for row in rows if row["method"] == "checkpoint"), {})
    if baseline.get("saved_ratio") and baseline.get("step_ratio"):
        sentence += (
            f" Checkpointing every block saves {baseline['saved_ratio']:.2f} times fewer bytes at "
            f"{baseline['step_ratio']:.2f} times the step time."
        )
    return sentence


def _charts(rows: Sequence[Row], model: str) -> list[tuple[str, str]]:
    """(heading, SVG) of each chart that the rows are enough for."""
    time_description = f"Saved bytes against step time of {len(rows)} methods on {model}"
    place_description = f"Bytes saved by operator for each method on {model}"
    charts = (
        ("Memory against time", "tradeoff", tradeoff(rows, ""), time_description),
        ("Where the memory is", "where", where(rows, ""), place_description),
    )
    return [
        (heading, as_svg(chart, name, description))
        for heading, name, chart, description in charts
        if chart is not None
    ]


def _table(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, list[_Cell]]]:
    """(method, its cells) of every row."""
    best = {
        key: min((row[key] for row in rows if row.get(key) is not None), default=None)
        for key in ("saved_bytes", "peak_bytes", "step_ms")
    }
    plain: Row = next((row for row in rows if row["method"] == "plain"), {})

    def mark(key: str, row: Row) -> str:
        if row.get(key) is not None and row[key] == best.get(key):
            return "best"
        return "worse" if worse_than_plain(key, row, plain) else ""

    return [
        (row["method"], [(cell(key, row), row.get(key), mark(key, row)) for key in keys])
        for row in rows
    ]


def _caveats(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The methods of each caveat."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        for caveat in row.get("caveats", ()):
            methods.setdefault(caveat, []).append(row["method"])
    return methods


def _facts(setting: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Command, device, versions and date of the measurement; an unknown value is empty."""
    timed = [len(row["times_ms"]) for row in rows if row.get("times_ms")]
    return {
        "command": setting["command"],
        "device": setting.get("device_name", setting["device"]),
        "threads": setting.get("threads", ""),
        "timed steps": _timed(timed),
        "versions": ", ".join(f"{k} {v}" for k, v in setting.get("versions", {}).items()),
        "commit": setting.get("commit", ""),
        "date": setting.get("date", ""),
    }


def _timed(counts: Sequence[int]) -> str:
    """The numbers of timed steps in words."""
    if not counts:
        return ""
    suffix = "" if min(counts) == max(counts) else f", at least {min(counts)} of slow methods"
    return f"{max(counts)} a method{suffix}"


def _inputs(setting: Mapping[str, Any]) -> str:
    """The inputs and the arithmetic in a sentence."""
    described = describe(setting).removeprefix(f"{setting['model']}, ")
    torch = setting.get("versions", {}).get("torch")
    return f"Inputs {described}{f', PyTorch {torch}' if torch else ''}."


def _asset(name: str) -> str:
    """The text of a file of this folder."""
    return resources.files("mesa_train.report").joinpath(name).read_text(encoding="utf-8")
