"""Compute and format the columns of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mesa_train.policy import PRESETS
from mesa_train.utils.formatting import format_bytes

Row = Mapping[str, Any]

# A step that is longer than plain's by this factor, or a gradient error that is larger by this
# factor, counts as worse than plain.
TIME_MARGIN, ERROR_MARGIN = 1.05, 2.0


def with_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Add the ratios to plain to each row.

    `saved_ratio` is plain's saved bytes divided by the row's. `step_ratio` is the row's step time
    divided by plain's.
    """
    plain = next((row for row in rows if row["method"] == "plain"), {})
    extended = []
    for row in rows:
        extra: dict[str, Any] = {}
        if plain.get("saved_bytes") and row.get("saved_bytes"):
            extra["saved_ratio"] = plain["saved_bytes"] / row["saved_bytes"]
        if plain.get("step_ms") and row.get("step_ms"):
            extra["step_ratio"] = row["step_ms"] / plain["step_ms"]
        extended.append({**row, **extra})
    return extended


def worse_than_plain(key: str, row: Row, plain: Row) -> bool:
    """True if a value is worse than plain's by more than noise."""
    value, plain_value = row.get(key), plain.get(key)
    if row is plain or value is None or plain_value is None:
        return False
    if key in ("saved_bytes", "peak_bytes"):
        return bool(value > plain_value)
    if key == "saved_ratio":
        return bool(value < 1)
    if key in ("step_ms", "step_ratio"):
        return bool(value > TIME_MARGIN * plain_value)
    return bool(key == "gradient_error" and value > ERROR_MARGIN * plain_value)


def notes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The reasons why rows are incomplete, with the methods of each reason."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            methods.setdefault(row["note"], []).append(row["method"])
    return methods


def cell(key: str, row: Row) -> str:
    """Format a value for a table; "" if there is none."""
    value = row.get(key)
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key == "saved_ratio":
        return f"{value:.2f}x"
    if key == "step_ratio":
        return f"{value:.2f}"
    if key == "step_ms":
        low, high = row.get("step_ms_quartiles", (value, value))
        return f"{value:,.0f} ({low:,.0f} to {high:,.0f})"
    if key == "gradient_error":
        return f"{value:.2%}"
    if key == "gradient_cosine":
        return f"{value:.5f}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows with a `name`: plain, the presets, then any other name.

    Runs may finish in any order. Rows of one name keep their order.
    """
    known = ["plain", *PRESETS]
    return sorted(
        rows, key=lambda row: known.index(row["name"]) if row["name"] in known else len(known)
    )
