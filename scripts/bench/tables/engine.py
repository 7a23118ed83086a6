"""Tables about the library: steps, operators, parity, families of models, rounding, plans,
compatibility, soak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, newest_run, origins, table


@table("bench_step.jsonl", "python scripts/bench/step.py", by="model dtype")
def step(rows: Sequence[Row]) -> str:
    """The newest run on a model, a line per method.

    If the newest run has no times, a method has those of the last timed run that saved the same bytes.
    """
    newest = newest_run(rows)
    head = [
        *("method", "saved for the backward", "less", "peak of the step", "gradient error"),
        *("step", "step vs. plain", "largest batch in 24 GiB"),
    ]
    lines, timed_rows = [], []
    for row in newest:
        if "note" in row:
            lines.append([row["method"], row["note"], *[""] * (len(head) - 2)])
            continue
        timed = _timed(row, rows)
        if timed is not None:
            timed_rows.append(timed)
            low, high = timed["step_ratio_quartiles"]
            ratio = f"{timed['step_ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            [
                row["method"],
                format_bytes(row["saved_bytes"]),
                f"{row['saved_ratio']:.2f}x",
                format_bytes(row["peak_bytes"]) if row.get("peak_bytes") else "",
                f"{row['gradient_error']:.2%}",
                "not timed" if timed is None else f"{timed['step_ms']:.0f} ms",
                "" if timed is None else ratio,
                str(row.get("largest_batch", "")),
            ]
        )
    any_row, last = newest[0], timed_rows[0] if timed_rows else newest[0]
    remarks = "".join(f" {row['method']}: {row['remark']}." for row in newest if "remark" in row)
    earlier = [row for row in timed_rows if row["date"] != any_row["date"]]
    if earlier:
        remarks += f" Times: {origins(timed_rows)} A method that saves other bytes since then was not timed again."
    return markdown(head, lines) + (
        f"\n{any_row['model']}, batch {any_row['batch_size']}, {any_row['dtype']}. The gradient error is the "
        "relative L2 distance from the plain float32 gradient over all parameters. The peak includes weights and "
        "AdamW's states. The largest batch counts saved tensors, weights and these states. A step is forward, backward "
        f"and AdamW: median of {last['rounds']} rounds that take turns, quartiles in brackets."
        f"{remarks} {origins(newest)}\n"
    )


def _timed(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row, or the last timed row of its method with the same saved bytes; None without one."""
    if "step_ms" in row:
        return row
    names = ("method", "batch_size", "saved_bytes")
    same = [r for r in rows if "step_ms" in r and all(r[name] == row[name] for name in names)]
    return same[-1] if same else None


@table("host.jsonl", "python scripts/bench/host.py", by="path")
def host(rows: Sequence[Row]) -> str:
    """The newest run of a launch path, a line per model and method."""
    newest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    head = ["model", "method", "step", "vs. plain", "Python calls", "operators"]
    lines = [
        [
            row["model"],
            row["method"],
            f"{row['step_ms']:.1f} ms",
            "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_quartiles"]),
            f"{row['python_calls']:,}",
            f"{row['operators']:,}",
        ]
        for row in newest
    ]
    return markdown(head, lines) + (
        "\nA step is forward and backward of 2 images of 32 x 32 pixels: median of "
        f"{newest[0]['rounds']} rounds that take turns, quartiles in brackets. "
        '"compress" is functional code and is compared with the same code without it. '
        '"mesa8-python" runs every row in Python. Python calls and operators are counts of one step. '
        f"{origins(newest)}\n"
    )


@table("bench_step.jsonl", "python scripts/bench/step.py", by="device_type dtype")
def steps(rows: Sequence[Row]) -> str:
    """The newest run on every model and batch on a kind of device, "less memory, step" a method."""
    newest: dict[tuple[str, int], dict[str, Row]] = {}
    timed = [row for row in rows if "step_ratio" in row]
    for row in timed:
        last = newest.setdefault((row["model"], row["batch_size"]), {})
        if last and next(iter(last.values()))["date"] != row["date"]:
            last.clear()
        last[row["method"]] = row
    methods = ["mesa8", "mesa6", "mesa4", "mesa8-recompute", "checkpoint"]
    lines: list[list[str]] = []
    shown: list[Row] = []
    for (model, _), by_method in sorted(newest.items()):
        plain = by_method["plain"]
        size = plain["shapes"][0][-1]
        cells = [
            f"{by_method[m]['saved_ratio']:.1f}x, {by_method[m]['step_ratio']:.2f}"
            if m in by_method
            else ""
            for m in methods
        ]
        shown += [plain, *(by_method[m] for m in methods if m in by_method)]
        batch = f"{plain['batch_size']} x {size} px"
        lines.append([model, batch, format_bytes(plain["saved_bytes"]), *cells])
    head = ["model", "batch", "plain saves", *methods]
    return markdown(head, lines) + (
        "\nEach cell has plain's saved bytes divided by the method's, and the step's time divided by plain's. A "
        "step is forward, backward and AdamW: median of rounds that take turns. "
        f"{', '.join(dict.fromkeys(map(_computed, shown)))}. {origins(shown)}\n"
    )


def _computed(row: Row) -> str:
    return row["dtype"] if row["dtype"] == "float32" else f"{row['dtype']} autocast"


@table("ops.jsonl", "python scripts/bench/ops.py", by="device_type")
def ops(rows: Sequence[Row]) -> str:
    """The newest run on a kind of device, 8 and 4 bits."""
    newest = newest_run(rows)
    head = ["operator", "on", "time", "a copy takes", "share"]
    lines = [
        [
            row["operator"],
            row["variant"],
            f"{row['time_us'] / 1e3:.2f} ms",
            f"{row['copy_us'] / 1e3:.2f} ms",
            f"{row['share']:.0%}",
        ]
        for row in newest
        if not any(few in row["variant"] for few in ("2 bits", "3 bits"))
    ]
    return markdown(head, lines) + (
        "\nThe copy reads and writes the same number of bytes, from rows with the strides of the input. Operator and "
        "copy run in turns, after a warm-up, with flushed caches. Times are medians of "
        f"{newest[0]['rounds']} rounds. {origins(newest)}\n"
    )


@table("families.jsonl", "python scripts/bench/families.py")
def families(rows: Sequence[Row]) -> str:
    """The newest rows, a line per model."""
    newest = {(row["model"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(method for _, method in newest))
    presets = [method for method in methods if method != "plain"]
    head = ["model", "plain saves", *[f"{p} saves" for p in presets]]
    head += ["plain's gradient error", *[f"{p}'s" for p in presets]]
    lines = []
    for model in dict.fromkeys(model for model, _ in newest):
        of_model = {m: newest[model, m] for m in methods if (model, m) in newest}
        saved = [
            f"{format_bytes(row['saved_bytes'])}"
            + (f" ({row['saved_ratio']:.2f}x less)" if method != "plain" else "")
            for method, row in of_model.items()
        ]
        lines.append(
            [model, *saved, *[f"{row['gradient_error']:.2%}" for row in of_model.values()]]
        )
    return markdown(head, lines) + (
        f"\nBatch {rows[-1]['batch_size']}, {rows[-1]['dtype']}, random weights; gradient error: "
        "relative L2 distance from the plain float32 gradient over all parameters. "
        f"{origins([*newest.values()])}\n"
    )


@table("ops_by_width.jsonl", "python scripts/bench/ops.py --out docs/results/ops_by_width.jsonl")
def ops_by_width(rows: Sequence[Row]) -> str:
    """The newest run: a line for each call, a column for each width."""
    newest = newest_run(rows)
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for row in newest:
        parts = row["variant"].split(", ")
        width = next((part for part in parts if part.endswith(" bits")), None)
        if width is not None:
            rest = ", ".join(part for part in parts if part != width)
            text = f"{row['time_us'] / 1e3:.2f} ms, {row['share']:.0%}"
            shares.setdefault((row["operator"], rest), {})[width] = text
    widths = [f"{bits} bits" for bits in (8, 6, 5, 4, 3, 2)]
    lines = [
        [*name, *(by_width.get(width, "") for width in widths)] for name, by_width in shares.items()
    ]
    return markdown(["operator", "on", *widths], lines) + (
        "\nTime, and the time of a copy of the same bytes divided by it. "
        f"{newest[0]['dtype']}, {newest[0]['rounds']} rounds. {origins(newest)}\n"
    )


@table("rounding.jsonl", "python scripts/bench/rounding.py")
def rounding(rows: Sequence[Row]) -> str:
    """The newest run."""
    lines = []
    newest = newest_run(rows)
    for row in newest:
        changes = row["changes"] and ", ".join(f"{k}={v}" for k, v in row["changes"].items())
        saved = format_bytes(row["saved_bytes"])
        lines.append([row["preset"], changes or "", saved, f"{row['gradient_error']:.2%}"])
    return markdown(["preset", "changed", "saved for the backward", "gradient error"], lines) + (
        f"\n{rows[-1]['model']}, batch {rows[-1]['batch_size']}, "
        f"{_computed({'dtype': 'bf16', **rows[-1]})}, random "
        "initialisation; relative L2 distance from the plain float32 gradient over all "
        f"parameters. {origins(newest)}\n"
    )


@table("plans.jsonl", "python scripts/bench/planner.py")
def plans(rows: Sequence[Row]) -> str:
    """The newest rows: predictions, with measurements in brackets."""
    newest = {(row["model"], row["share"]): row for row in rows}
    head = ["model", "budget", "saved", "peak of the step", "time, plain = 1", "gradient error"]
    head.append("operands at each choice")
    lines, errors = [], {"saved_bytes": 0.0, "peak_bytes": 0.0, "time_ratio": 0.0}
    for (model, share), row in sorted(newest.items()):
        predicted, measured = row["predicted"], row["measured"]
        errors = {k: max(v, abs(predicted[k] / measured[k] - 1)) for k, v in errors.items()}
        saved, peak = (
            f"{format_bytes(predicted[k])} ({format_bytes(measured[k])})"
            for k in ("saved_bytes", "peak_bytes")
        )
        lines.append(
            [
                f"{model}, {row.get('dtype', 'bf16')}"
                if share == min(s for m, s in newest if m == model)
                else "",
                "smallest possible" if share == 0 else format_bytes(row["budget"]),
                saved,
                peak,
                f"{predicted['time_ratio']:.2f} ({measured['time_ratio']:.2f})",
                f"{predicted['gradient_error']:.2%} ({measured['gradient_error']:.2%})",
                _choices(row["choices"]),
            ]
        )
    worst = ", ".join(f"{name} {errors[key]:.1%}" for key, name in _PREDICTED.items())
    return markdown(head, lines) + (
        "\nPredicted values, with measured values in brackets; bf16 is autocast; random weights. The peak is of a "
        "whole training step, with weights and AdamW's states. Largest relative errors of the predictions: "
        f"{worst}. {origins([*newest.values()])}\n"
    )


def _choices(summary: Sequence[Sequence[Any]]) -> str:
    """The number of operands at each choice of a plan, from few bits to many, then other choices."""
    counts: dict[str, int] = {}
    for operand, choice, count in summary:
        if operand != "block":
            counts[choice] = counts.get(choice, 0) + count
    order = sorted(counts, key=lambda choice: (not choice[0].isdigit(), choice))
    return ", ".join(f"{choice}: {counts[choice]}" for choice in order)


_PREDICTED = {"saved_bytes": "saved bytes", "peak_bytes": "peak", "time_ratio": "time"}


@table(
    "compatibility.jsonl",
    "MESA_TRAIN_COMPATIBILITY=docs/results/compatibility.jsonl pytest tests/integration",
    by="setup",
)
def compatibility(rows: Sequence[Row]) -> str:
    """The outcomes of tests/integration for one setup, a line per feature."""
    lines = [[row["feature"], row["outcome"], row["note"], str(row["tests"])] for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    return markdown(["feature", "outcome", "note", "tests"], lines) + f"\n{versions}.\n"


@table("soak.jsonl", "python scripts/bench/soak.py")
def soak(rows: Sequence[Row]) -> str:
    """The newest row of every policy."""
    newest = {row["policy"]: row for row in rows}
    lines = [
        [
            policy,
            f"{row['steps']:,}",
            str(row["failed"]),
            f"{row['slope_bytes_per_step']:+.1f} bytes",
            format_bytes(row["resident_bytes"]),
            str(row["left"]),
        ]
        for policy, row in newest.items()
    ]
    head = ["policy", "steps", "of them failed", "growth per step", "resident at the end"]
    return markdown([*head, "stashes not freed"], lines) + (
        f"\n{rows[-1]['model']}, batch {rows[-1]['batch_size']}. The growth is the slope of resident memory over the "
        "second half of the steps. One process runs the policies in this order. "
        f"{origins([*newest.values()])}\n"
    )
