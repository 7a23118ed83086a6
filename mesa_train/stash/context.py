"""Where a call comes from and what was saved of it: the module's context, and the report of a forward."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mesa_train.policy import Rules

from .stash import Stash


@dataclasses.dataclass(frozen=True)
class ModuleContext:
    """Where a call comes from: the module's qualified name, its rules, and whether its forward is
    checkpointed."""

    name: str
    rules: Rules
    module: nn.Module | None = None
    checkpointed: bool = False
    # Of running ranges (see `codecs/running.py`), by operator, operand and use.
    ranges: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False)


class Report:
    """What one forward kept, by module, operator and operand: `rows[key] = (how, calls, bytes)`."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], tuple[int, int]] = {}

    def add(
        self,
        module: str,
        operator: str,
        operand: str,
        how: str,
        size: int,
        stash: Stash | None = None,  # noqa: ARG002 - for reports that look closer
    ) -> None:
        """Count one operand of one call; `size` is in bytes that nobody else keeps already."""
        if torch.compiler.is_compiling():
            return
        key = (module, operator, operand, how)
        row = self.rows.get(key)
        self.rows[key] = (1, size) if row is None else (row[0] + 1, row[1] + size)
