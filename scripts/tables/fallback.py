"""Tables of docs/fallback.md: which functions' saved tensors are coded, and which stay exact."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.functions import function_name
from mesa_train.ops.coded import CODED
from mesa_train.training.records import Row
from tables.text import markdown, newest_run, origin, table

_FILE, _SCRIPT = "fallback.jsonl", "python scripts/bench_fallback.py"
_ROWED = "nn.functional."


@table(_FILE, _SCRIPT)
def fallback_sizes(rows: Sequence[Row]) -> str:
    """The functions of which only sizes are kept, in one paragraph."""
    found = sorted(
        {row["function"] for row in newest_run(rows) if decision(row["function"]) == "size"}
    )
    names = ", ".join(f"`{name}`" for name in found if not name.startswith(_ROWED))
    return f"{names}. {origin(rows[-1])}\n"


@table(_FILE, _SCRIPT)
def fallback_coded(rows: Sequence[Row]) -> str:
    """The functions that are coded, with the error of each kind of input."""
    return _table(rows, "coded")


@table(_FILE, _SCRIPT)
def fallback_exact(rows: Sequence[Row]) -> str:
    """The functions that stay exact, with the error that codes would have made."""
    return _table(rows, "exact")


def decision(function: str) -> str:
    """ "size", "coded" or "exact" for a function's name in the rows."""
    name, _, kind = function.removeprefix(_ROWED).partition(", ")
    name = name.partition(".")[0].removeprefix("linalg_")
    if name == "grid_sample":
        return "coded" if kind else "exact"
    ways = {function_name(f): way for f, way in CODED.items()}
    if name not in ways or (name == "pow" and kind not in ("exponent 2", "exponent 3")):
        return "exact"
    return "size" if ways[name].sizes else "coded"


def _table(rows: Sequence[Row], wanted: str) -> str:
    by: dict[str, list[Row]] = {}
    for row in newest_run(rows):
        if row["saved_bytes"] and decision(row["function"]) == wanted:
            by.setdefault(row["function"], []).append(row)
    lines = []
    for function, own in sorted(by.items()):
        worst = max(own, key=lambda row: row["error"])
        lines.append([f"`{function}`", _percent(worst["error"]), worst["inputs"], str(len(own))])
    return markdown(["function", "largest error", "on", "calls"], lines) + (
        "\nRelative L2 distance of the gradient that is furthest off, with 8-bit codes in groups of 128 "
        f"of every float tensor that the call saves. {origin(rows[-1])}\n"
    )


def _percent(error: float) -> str:
    return (
        "fails, or plain's is 0"
        if error >= 1e9
        else f"over {10:,} times"
        if error > 10
        else (f"{error:.2%}")
    )
