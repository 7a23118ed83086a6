"""Tables about the GPU run: steps beside their prediction, and the outcome of every section."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origin, table

_RUN, _SCRIPT = "gpu_first_run.jsonl", "bash scripts/bench/gpu.sh"
_NOT_RUN = "not run yet"


@table("gpu_prediction.jsonl", _SCRIPT, beside=_RUN)
def gpu_steps(predicted: Sequence[Row], measured: Sequence[Row]) -> str:
    """Predicted and measured steps, a line per predicted method."""
    newest = {
        row["method"]: row
        for row in measured
        if row["section"] == f"step {row.get('method')}"
        and row["device_type"] == "cuda"
        and row["model"] == predicted[0]["model"]
        and "step_ms" in row
    }
    plain = newest.get("plain")
    lines = []
    for row in predicted:
        prediction = [f"{row['step_ms']:.1f} ms", f"{row['step_ratio']:.2f}"]
        found = newest.get(row["method"])
        if found is None or plain is None:
            lines.append([row["method"], *prediction, _NOT_RUN, *[""] * 4])
            continue
        ratio = found["step_ms"] / plain["step_ms"]
        # Plain's deviation is that of its time, the others' that of their ratio.
        deviation = (
            found["step_ms"] / row["step_ms"]
            if row["method"] == "plain"
            else ratio / row["step_ratio"]
        )
        lines.append(
            [
                row["method"],
                *prediction,
                f"{found['step_ms']:.1f} ms",
                f"{ratio:.2f}",
                f"{deviation - 1:+.0%}",
                f"{found['host_ms']:.1f} ms",
                format_bytes(found["peak_bytes"]),
            ]
        )
    head = ["method", "predicted step", "vs. plain", "measured step", "vs. plain", "deviation"]
    first = predicted[0]
    measurement = origin(plain) if plain is not None else "Not run on a GPU yet."
    return markdown([*head, "host", "peak"], lines) + (
        f"\n{first['model']}, batch {first['batch_size']}, {first['dtype']}, {first['device']}. Prediction of "
        f"{first['date'][:10]}: {first['remark']} A step is forward, backward and AdamW. Host is the time until the "
        f"last launch of a step. {measurement}\n"
    )


@table(_RUN, _SCRIPT)
def gpu_sections(rows: Sequence[Row]) -> str:
    """The outcome of every section of the newest run on a GPU."""
    ends = [i for i, row in enumerate(rows[:-1]) if row["section"] == "end"]
    run = rows[ends[-1] + 1 if ends else 0 :]
    outcomes: dict[str, list[str]] = {}
    for row in run:
        if row["section"] == "end":
            continue
        outcome = outcomes.setdefault(row["section"], ["", "", ""])
        if "error" in row:
            outcome[1] = f"{outcome[1]}; {row['error']}" if outcome[1] else row["error"]
        if "skipped" in row:
            outcome[1] = f"skipped: {row['skipped']}"
        if row.get("done"):
            outcome[0] = f"{row['seconds']:.0f} s"
        if "same_output" in row:
            same, calls = [int(n) for n in (outcome[2] or "0 of 0").split(" of ")]
            outcome[2] = f"{same + row['same_output']} of {calls + 1}"
    lines = [
        [section, time, error or "no error", same]
        for section, (time, error, same) in outcomes.items()
    ]
    source = next((row for row in run if "versions" in row), None)
    return markdown(["section", "time", "outcome", "outputs bit for bit"], lines) + (
        f"\n{origin(source)}\n" if source else ""
    )
