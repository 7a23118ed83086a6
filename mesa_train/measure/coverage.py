"""Report how the last forward of a wrapped model stored each saved tensor, and why.

The rows go by module and operator. A tensor that stays uncompressed has a row with the reason.
Coverage costs nothing extra: the recorder counts during the forward, and this file only reads the
counts.
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
    """One operand of one operator in one module.

    Args:
        module: qualified name of the module.
        operator: name of the torch function.
        operand: name of the saved tensor of that operator.
        how: how it is stored, see `Coverage`.
        calls: number of calls.
        bytes: new bytes that the calls stored.
    """

    module: str
    operator: str
    operand: str
    how: str
    calls: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The saved tensors of one forward and how each is stored.

    The `how` of a row is one of these:

    * a codec, or "1 bit";
    * "shared": an earlier stash is used again;
    * "rebuilt": from other stashes;
    * "its size": the backward reads no element of the tensor;
    * "uncompressed" with the reason, which is "exact" for a function that is left to PyTorch.

    Args:
        rows: one row for each module, operator, operand and `how`.
    """

    rows: tuple[CoverageRow, ...]

    def by_operator(self) -> dict[tuple[str, str, str], tuple[int, int]]:
        """Sum the rows over modules.

        Returns:
            (calls, bytes) by (operator, operand, how), most bytes first.
        """
        totals: dict[tuple[str, str, str], tuple[int, int]] = {}
        for row in self.rows:
            key = (row.operator, row.operand, row.how)
            calls, total = totals.get(key, (0, 0))
            totals[key] = calls + row.calls, total + row.bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def table(self) -> str:
        """Format the rows, summed over modules, as aligned text."""
        body = [
            (*key, str(calls), format_bytes(total))
            for key, (calls, total) in self.by_operator().items()
        ]
        return format_table(("operator", "operand", "saved as", "calls", "size"), body)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, one entry a row."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        return self.table()


def coverage(model: nn.Module) -> Coverage:
    """Read how the last forward of a wrapped model stored its saved tensors.

    No torch function mode gets the call of a `torch.autograd.Function` of another library. Its
    saved tensors are uncompressed, and have no row. `mesa_train.footprint` counts them under the name of
    its class.

    Args:
        model: a model that `mesa_train.wrap` wrapped.

    Returns:
        A `Coverage`, most bytes first.

    Raises:
        ValueError: the model is not wrapped, or it ran no forward with gradients since it was
            wrapped.
    """
    report = report_of(model)
    if report is None:
        raise ValueError(
            "coverage needs a wrapped model; call mesa_train.wrap on this "
            f"{type(model).__name__} first"
        )
    if not report.rows:
        raise ValueError(
            "coverage reads the last forward; run a forward with gradients enabled first"
        )
    rows = [CoverageRow(*key, *counts) for key, counts in report.rows.items()]
    return Coverage(tuple(sorted(rows, key=lambda row: -row.bytes)))
