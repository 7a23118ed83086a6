"""Match the patterns of a policy: module names with `*`, operators and operands.

An error for a mistyped pattern has the closest names.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .torch_functions import checked, is_function, plain_name

# Patterns of modules by their role, not by their names. A model may have no such module.
ROLES = ("last_norm", "last_linear", "deformable_conv")


def match_override(
    pattern: str,
    names: list[str],
    operators: Mapping[str, tuple[str, ...]],
    roles: Mapping[str, set[str]] | None = None,
) -> tuple[set[str] | None, str | None, str | None]:
    """Match the pattern of an override.

    Args:
        pattern: MODULE, OPERATOR, OPERATOR.OPERAND, or MODULE:OPERATOR.OPERAND. MODULE can be one of `ROLES`.
        names: qualified names of the model's modules.
        operators: operands by the name of the operator.
        roles: the names of the modules that the patterns of `ROLES` mean; None: they mean no module.

    Returns:
        (names of the covered modules or None for all, operator or None, operand or None).

    Raises:
        ValueError: the pattern matches nothing.
    """
    modules, _, operation = pattern.rpartition(":")
    if not modules and operation.partition(".")[0] not in operators:
        modules, operation = operation, ""
    operator, _, operand = operation.partition(".")
    if operator == "fallback" and operand not in ("", "saved"):
        operand = checked(pattern, operand)
    elif operation and (
        operator not in operators or (operand and operand not in operators[operator])
    ):
        known = [
            f"{operator_name}.{operand_name}"
            for operator_name, operand_names in operators.items()
            for operand_name in operand_names
        ]
        choices = known if operator in operators else list(operators)
        raise ValueError(
            f"override {pattern!r} matches no operator; choose from {', '.join(choices)}"
            f"{near_miss(operation, choices)}"
        )
    if not modules:
        return None, operator, operand or None
    matches = matching(modules, names)
    matches |= (roles or {}).get(modules, set())
    if not matches and modules not in ROLES:
        known = [*names, *operators, *ROLES]
        close = difflib.get_close_matches(modules, known, n=4, cutoff=0.4)
        if is_function(modules):
            close = [f"fallback.{plain_name(modules)}", *close]
        hint = f"close names: {', '.join(close)}" if close else f"operators: {', '.join(operators)}"
        raise ValueError(f"override {pattern!r} matches no module and no operator; {hint}")
    covered = {name for name in names if any(is_inside(name, outer) for outer in matches)}
    return covered, operator or None, operand or None


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that a pattern with `*` matches as a whole."""
    expression = re.compile(fnmatch.translate(pattern))
    return {n for n in names if expression.match(n)}


def is_inside(name: str, outer: str) -> bool:
    """True if a module is `outer` or a part of it; "" is the model."""
    return not outer or name == outer or name.startswith(outer + ".")


def near_miss(value: Any, choices: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" with the choice closest to `value`, or ""."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
