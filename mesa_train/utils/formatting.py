"""Format sizes, settings and tables as plain text, without any other package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(ib|b)?")


def format_bytes(size: int) -> str:
    """Format a size in its best unit: 0, 16 B, 4.0 KiB, 550.4 MiB, and from 10 GiB on 12.3 GiB."""
    if size < 2**10:
        return f"{size} B" if size else "0"
    if size < 2**20 / 10:
        return f"{size / 2**10:.1f} KiB"
    if size < 10 * 2**30:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:,.1f} GiB"


def format_gib(size: int) -> str:
    """Format a size in GiB as a plain number; "-" for 0."""
    if not size:
        return "-"
    return f"{size / 2**30:.2f}" if size >= 0.005 * 2**30 else "<0.01"


def parse_bytes(text: str, option: str = "") -> int:
    """Read a size: "24GiB", "800 MB", "1.5T", "4096".

    Units with an i (KiB, MiB, GiB, TiB) or without a B are binary; KB, MB, GB and TB are decimal.

    Args:
        text: the size.
        option: name of the command line's option, for the errors. With it, a number under a million
            needs a unit.

    Returns:
        Bytes.

    Raises:
        ValueError: the text is not a size, or the size is not above 0.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    prefix_text = f"{option}: " if option else ""
    if match is None or float(match[1]) <= 0:
        raise ValueError(
            f"{prefix_text}a size must be a number with a unit such as 24GiB or 800MB (KiB, MiB, GiB, "
            f"TiB, KB, MB, GB, TB), got {text!r}"
        )
    number, prefix, kind = float(match[1]), match[2] or "", match[3] or ""
    if option and not prefix and not kind and number < 1e6:
        raise ValueError(
            f"{prefix_text}a size needs a unit, such as {text.strip()}GiB, got {text.strip()!r}"
        )
    base = 1000 if kind == "b" and prefix else 1024
    return int(number * base ** " kmgt".index(prefix or " "))


def format_shapes(shapes: Sequence[Sequence[int]], limit: int = 4) -> str:
    """Format shapes as `8x3x224x224, 8x12`.

    Args:
        shapes: the shapes of the tensors.
        limit: most shapes in the text; for more tensors, the text ends in the number of the others.
    """
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[: limit - 1])} and {len(texts) - limit + 1} more tensors"


def format_precision(dtype: str | None, weights: str = "float32") -> str:
    """Describe the arithmetic of a comparison in words.

    Args:
        dtype: of autocast; None or "float32" for no autocast.
        weights: dtype of the weights, or "mixed".
    """
    if dtype in (None, "float32"):
        return weights if weights != "mixed" else "no autocast"
    return f"{dtype} autocast" if weights == "float32" else f"{dtype} autocast, {weights} weights"


def describe(setting: Mapping[str, Any]) -> str:
    """Describe a measurement in one line: model, inputs, arithmetic, device, threads.

    Args:
        setting: model, shapes, dtype and device; optional are weights, device_name and threads.
    """
    parts = [
        str(setting["model"]),
        format_shapes(setting["shapes"]),
        format_precision(setting["dtype"], setting.get("weights", "float32")),
        str(setting.get("device_name", setting["device"])),
    ]
    if setting.get("threads") and setting["device"] == "cpu":
        count = setting["threads"]
        parts.append(f"{count} thread{'s' if count > 1 else ''}")
    return ", ".join(parts)


def format_ratio(before: int, after: int) -> str:
    """Format `before` divided by `after`; "-" if one of them is 0."""
    if not before or not after:
        return "-"
    ratio = before / after
    digits = 0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2
    return f"{ratio:,.{digits}f}x"


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], rule_before: int | None = None
) -> str:
    """Format an aligned table, the first column to the left.

    Args:
        head: the headings.
        rows: the cells.
        rule_before: index of a row with a rule above it; None for a rule under the head alone.
    """
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [_aligned(head, widths), rule]
    for index, row in enumerate(rows):
        if index == rule_before and index:
            lines.append(rule)
        lines.append(_aligned(row, widths))
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """One aligned line."""
    cells = [
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
