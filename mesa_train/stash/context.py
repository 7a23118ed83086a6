"""The module context of a call (name, rules), and the report of a forward's saved tensors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mesa_train.policy import Rules

from .stash import Stash


@dataclasses.dataclass(frozen=True)
class ModuleContext:
    """The module that a call comes from.

    Attributes:
        name: the module's qualified name.
        rules: the policy of the module.
        module: the module, or None under `compress`.
        checkpointed: whether the module's forward is checkpointed.
        ranges: the running ranges of the module.
    """

    name: str
    rules: Rules
    module: nn.Module | None = None
    checkpointed: bool = False
    # Running ranges (see `codecs/running.py`), by operator, operand and use.
    ranges: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False)


class Report:
    """The tensors that one forward saved. `rows[module, operator, operand, how] = (calls,
    bytes)`."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], tuple[int, int]] = {}

    def add(
        self,
        module: str,
        operator: str,
        operand: str,
        how: str,
        size: int,
        stash: Stash | None = None,  # noqa: ARG002 - for subclasses that inspect the stash
    ) -> None:
        """Count one operand of one call.

        Args:
            module: the module's qualified name.
            operator: the operator.
            operand: the saved operand.
            how: how it is saved, such as "shared".
            size: bytes that no other operand holds already.
            stash: the stash, for subclasses.
        """
        if torch.compiler.is_compiling():
            return
        key = (module, operator, operand, how)
        row = self.rows.get(key)
        self.rows[key] = (1, size) if row is None else (row[0] + 1, row[1] + size)
