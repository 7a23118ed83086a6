"""Coverage: what the last forward of a wrapped model stored how, by module and operator, and what
it left alone and why.

Costs nothing of its own: the interception counts as it goes, and this only reads the counts.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import nn

from mesa_train.engine.wrap import report_of
from mesa_train.utils.formatting import format_bytes, format_table


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One operand of one operator in one module: how it was kept, how often, in how many new
    bytes."""

    module: str
    operator: str
    operand: str
    how: str
    calls: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What a forward stored. `how` of a row is a codec, "1 bit", "shared" (a stash that stood
    already), "rebuilt" (from other stashes), "its size" (of a tensor of which the backward reads no
    element), or "uncompressed" with the reason: "exact" for a function that is left to PyTorch."""

    rows: tuple[CoverageRow, ...]

    def by_operator(self) -> dict[tuple[str, str, str], tuple[int, int]]:
        """(calls, bytes) by operator, operand and how, largest first."""
        totals: dict[tuple[str, str, str], tuple[int, int]] = {}
        for row in self.rows:
            key = (row.operator, row.operand, row.how)
            calls, total = totals.get(key, (0, 0))
            totals[key] = calls + row.calls, total + row.bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def table(self) -> str:
        """The rows summed over modules, as aligned text."""
        body = [
            (*key, str(calls), format_bytes(total))
            for key, (calls, total) in self.by_operator().items()
        ]
        return format_table(("operator", "operand", "saved as", "calls", "size"), body)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one entry per row."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        return self.table()


def coverage(model: nn.Module) -> Coverage:
    """What the last forward of a wrapped `model` kept, by module and operator.

    Raises ValueError if the model is not wrapped, or has not run a forward with gradients since.
    """
    report = report_of(model)
    if report is None:
        raise ValueError(
            "coverage needs a wrapped model; call mesa_train.wrap on this "
            f"{type(model).__name__} first"
        )
    if not report.rows:
        raise ValueError("coverage reads what a forward kept; run one with gradients enabled first")
    rows = [CoverageRow(*key, *counts) for key, counts in report.rows.items()]
    return Coverage(tuple(sorted(rows, key=lambda row: -row.bytes)))
