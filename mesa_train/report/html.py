"""The report of a comparison as one HTML file: charts, sortable tables, the module tree, the command.

Nothing is loaded from anywhere. It follows the reader's light or dark setting, fits a phone (tables
and charts scroll sideways in their frames) and prints with everything open.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mesa_train.measure.module_tree import Node, grow
from mesa_train.utils.formatting import describe, format_bytes, format_ratio

from .charts import as_svg, tradeoff, where
from .columns import ERROR_MARGIN, TIME_MARGIN, cell, notes, with_ratios, worse_than_plain

Row = Mapping[str, Any]

# key, heading, explanation.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("saved_bytes", "saved for the backward", "every storage once, parameters and buffers apart"),
    ("saved_ratio", "less than plain", "plain's saved bytes by this method's"),
    ("offloaded_bytes", "in CPU memory", "moved there between forward and backward"),
    ("peak_bytes", "peak of the step", "allocated at once, weights and optimizer states included"),
    ("resident_bytes", "resident set", "of the process at the peak, beyond what it had before"),
    ("weight_bytes", "weights", "parameters and buffers"),
    ("gradient_bytes", "gradients", "when the backward is done"),
    ("optimizer_bytes", "optimizer", "AdamW's two moments"),
    ("step_ms", "step, ms", "forward, backward and optimizer; median and quartiles"),
    ("step_ratio", "step vs. plain", "this method's median by plain's"),
    ("images_per_s", "images/s", ""),
    ("gradient_error", "gradient error", "relative L2 distance from the plain float32 gradient"),
    ("gradient_cosine", "cosine", "of the angle to the plain float32 gradient"),
    ("largest_batch", "largest batch", "that fits the memory asked for"),
)
_TREE_METHODS = ("plain", "mesa8", "mesa4", "mesa8-recompute", "checkpoint")


def write_report(path: Path, rows: Sequence[Row], setting: Mapping[str, Any]) -> None:
    """Write the page.

    rows: as `processes.measure` yields them. setting: model, shapes, dtype, device, command,
    versions, date, and what else there is to tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(rows, setting), encoding="utf-8")


def render(rows: Sequence[Row], setting: Mapping[str, Any]) -> str:
    """The page as text."""
    rows = with_ratios(rows)
    model = str(setting["model"])
    body = "".join(
        [
            f"<h1>{_text(model)}</h1>",
            f'<p class="lead">{_text(summary(rows))}</p>',
            f"<p>{_text(_what(setting))}</p>",
            _section("Methods", _frame(_table(rows)) + _key(rows) + _failures(rows)),
            _charts(rows, model),
            _tree(rows),
            _section("What to know", _caveats(rows)),
            _section("How it was measured", _how(setting, rows)),
        ]
    )
    style, script = _asset("report.css"), _asset("report.js")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(model)}: memory of training methods</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def summary(rows: Sequence[Row]) -> str:
    """One sentence: what the best known trade costs here."""
    best = [r for r in rows if r["method"] == "mesa8" and r.get("saved_ratio")]
    if not best:
        return f"{len(rows)} methods compared."
    row = best[0]
    said = f"mesa8 keeps {row['saved_ratio']:.2f} times less than plain"
    if row.get("step_ratio"):
        said += f" at {row['step_ratio']:.2f} times its step time"
    plain: Row = next((r for r in rows if r["method"] == "plain"), {})
    if row.get("gradient_error") is not None:
        said += f", with a gradient error of {row['gradient_error']:.2%}"
        if plain.get("gradient_error") is not None:
            said += f" (plain: {plain['gradient_error']:.2%})"
    said += "."
    baseline: Row = next((r for r in rows if r["method"] == "checkpoint"), {})
    if baseline.get("saved_ratio") and baseline.get("step_ratio"):
        said += (
            f" Checkpointing every block keeps {baseline['saved_ratio']:.2f} times less at "
            f"{baseline['step_ratio']:.2f} times the step time."
        )
    return said


def _charts(rows: Sequence[Row], model: str) -> str:
    """Both charts, beside each other where there is room."""
    charts = ""
    chart = tradeoff(rows, "")
    if chart is not None:
        described = f"Kept bytes against step time of {len(rows)} methods on {model}"
        charts += _section("Memory against time", _frame(as_svg(chart, "tradeoff", described)))
    bars = where(rows, "")
    if bars is not None:
        described = f"Bytes saved by operator for each method on {model}"
        charts += _section("Where the memory is", _frame(as_svg(bars, "where", described)))
    return f'<div class="charts">{charts}</div>' if charts else ""


def _table(rows: Sequence[Row]) -> str:
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    head = '<th scope="col" aria-sort="none"><button type="button">method</button></th>'
    for key, heading, why in columns:
        title = f' title="{_text(why)}"' if why else ""
        head += (
            f'<th scope="col" class="number" aria-sort="none" data-key="{key}"{title}>'
            f'<button type="button">{_text(heading)}</button></th>'
        )
    best = {
        key: min((row[key] for row in rows if row.get(key) is not None), default=None)
        for key in ("saved_bytes", "peak_bytes", "step_ms")
    }
    plain: Row = next((row for row in rows if row["method"] == "plain"), {})
    lines = []
    for row in rows:
        cells = f'<th scope="row">{_text(row["method"])}</th>'
        for key, *_ in columns:
            value = row.get(key)
            kind = "number"
            if value is not None and value == best.get(key):
                kind += " best"
            elif worse_than_plain(key, row, plain):
                kind += " worse"
            shown = _text(cell(key, row)) or '<span class="none">-</span>'
            cells += (
                f'<td class="{kind}" data-value="{"" if value is None else value}">{shown}</td>'
            )
        base = ' class="base"' if row is plain else ""
        lines.append(f"<tr{base}>{cells}</tr>")
    return (
        f'<table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _key(rows: Sequence[Row]) -> str:
    """What the colours of the table say."""
    said = '<span class="best">Best of its column</span>'
    if any(row["method"] == "plain" for row in rows):
        said += (
            '; <span class="worse">behind plain</span>: more bytes, a step slower by more than '
            f"{TIME_MARGIN - 1:.0%}, or a gradient error more than {ERROR_MARGIN:g} times plain's"
        )
    return f'<p class="key">{said}.</p>'


def _failures(rows: Sequence[Row]) -> str:
    failed = notes(rows)
    if not failed:
        return ""
    items = "".join(
        f"<dt>{_text(', '.join(methods))}</dt><dd>{_text(note)}</dd>"
        for note, methods in failed.items()
    )
    return f"<h3>Not measured, or not all of it</h3><dl>{items}</dl>"


def _tree(rows: Sequence[Row]) -> str:
    by_method = {row["method"]: row["by_module"] for row in rows if row.get("by_module")}
    methods = [m for m in _TREE_METHODS if m in by_method] or list(by_method)[:4]
    if not methods:
        return ""
    root = grow([by_method[m] for m in methods])
    heads = "".join(f"<span>{_text(m)}</span>" for m in methods)
    head = f'<div class="node head"><span class="name">module</span>{heads}</div>'
    note = (
        "<p>Bytes saved by each module with its submodules. Equal neighbours are one line: x12 stands "
        "for twelve of them, with the bytes of one.</p>"
    )
    buttons = '<p class="tools"><button type="button" data-open="1">Open all</button> '
    buttons += '<button type="button" data-open="0">Close all</button></p>'
    columns = f'style="--columns: {len(methods)}"'
    tree = f'<div class="tree" {columns}>{head}{_node(root, root, 0)}</div>'
    return _section("Modules", note + buttons + _frame(tree))


def _node(node: Node, root: Node, depth: int) -> str:
    count = f' <span class="count">x{node.count}</span>' if node.count > 1 else ""
    cells = ""
    for index, size in enumerate(node.sizes):
        whole = root.sizes[index] or 1
        share = 100 * size * node.count / whole
        less = "" if index == 0 else format_ratio(node.sizes[0], size)
        title = f"{share:.1f} % of the method's bytes" + (f", {less} less" if less else "")
        cells += (
            f'<span class="size" style="--share: {share:.2f}%" title="{title}">'
            f"{format_bytes(size)}</span>"
        )
    line = f'<span class="name" style="--depth: {depth}">{_text(node.label)}{count}</span>{cells}'
    if not node.children:
        return f'<div class="node leaf">{line}</div>'
    inner = "".join(_node(child, root, depth + 1) for child in node.children)
    opened = " open" if depth < 1 else ""
    return f'<details{opened}><summary class="node">{line}</summary>{inner}</details>'


def _caveats(rows: Sequence[Row]) -> str:
    told: dict[str, list[str]] = {}
    for row in rows:
        for caveat in row.get("caveats", ()):
            told.setdefault(caveat, []).append(row["method"])
    items = "".join(
        f"<dt>{_text(', '.join(names))}</dt><dd>{_text(caveat)}</dd>"
        for caveat, names in told.items()
    )
    return (
        "<p>Every method runs in a process of its own, on the same weights, batch and random "
        "numbers. Bytes are exact; times of different processes are compared, so trust "
        "differences larger than their quartiles.</p>"
        f"<dl>{items}</dl>"
    )


def _how(setting: Mapping[str, Any], rows: Sequence[Row]) -> str:
    timed = [len(row["times_ms"]) for row in rows if row.get("times_ms")]
    versions = ", ".join(f"{k} {v}" for k, v in setting.get("versions", {}).items())
    lines = {
        "command": f"<code>{_text(setting['command'])}</code>",
        "device": _text(setting.get("device_name", setting["device"])),
        "threads": _text(setting.get("threads", "")),
        "timed steps": _timed(timed),
        "versions": _text(versions),
        "commit": _text(setting.get("commit", "")),
        "date": _text(setting.get("date", "")),
    }
    items = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in lines.items() if v)
    return f"<dl>{items}</dl>"


def _timed(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    few = "" if min(counts) == max(counts) else f", down to {min(counts)} of slow ones"
    return f"{max(counts)} a method{few}"


def _what(setting: Mapping[str, Any]) -> str:
    said = describe(setting).removeprefix(f"{setting['model']}, ")
    torch = setting.get("versions", {}).get("torch")
    return f"Inputs {said}{f', PyTorch {torch}' if torch else ''}."


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{inner}</section>\n"


def _frame(inner: str) -> str:
    return f'<div class="frame" tabindex="0">{inner}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _asset(name: str) -> str:
    return resources.files("mesa_train.report").joinpath(name).read_text(encoding="utf-8")
