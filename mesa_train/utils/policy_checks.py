"""Checks of a policy's fields. Each error is one line with the field, the value and the choices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .patterns import near_miss

# Operators whose operands have at least 8 bits.
AT_LEAST_8 = ("fallback", "loss")


def choice(field: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a ValueError if `value` is none of the choices, or equals one but has another type (4.0, True)."""
    if isinstance(value, bool) or not any(
        [isinstance(value, type(known)) and value == known for known in choices]
    ):
        named = ", ".join(map(str, choices))
        raise ValueError(f"Policy.{field} must be one of {named}, got {value!r}")


def integer(field: str, value: Any, minimum: int) -> None:
    """Raise a TypeError if `value` is no integer, and a ValueError if it is below `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Policy.{field} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"Policy.{field} must be at least {minimum}, got {value}")


def running_ranges(bits: int, rounding: str, forward: str) -> None:
    """Raise a ValueError if running ranges would ignore one of these fields."""
    for field, value, allowed in (
        ("bits", bits, (8,)),
        ("rounding", rounding, ("stochastic", "auto")),
        ("forward", forward, ("exact",)),
    ):
        if value not in allowed:
            shown = " or ".join(f"{field}={known!r}" for known in allowed)
            raise ValueError(f"Policy.ranges='running' needs {shown}, got {field}={value!r}")


def mapping(overrides: Any) -> None:
    """Raise a TypeError if `overrides` does not map patterns to field changes."""
    expected = "Policy.overrides must map patterns to field changes, got"
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{expected} {type(overrides).__name__}")
    for pattern, changes in overrides.items():
        if not isinstance(pattern, str) or not isinstance(changes, Mapping):
            raise TypeError(f"{expected} {pattern!r}: {changes!r}")


def fields(pattern: str, changes: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a ValueError if an override sets a field that is not `known`."""
    for field in changes:
        if field not in known:
            raise ValueError(
                f"Policy.overrides[{pattern!r}] sets unknown field {field!r}; "
                f"choose from {', '.join(known)}{near_miss(field, known)}"
            )


def override(
    pattern: str,
    changes: Mapping[str, Any],
    operators: Mapping[str, Sequence[str]],
    nearest: Collection[tuple[str, str]],
) -> None:
    """Raise a ValueError if an override sets a field that has no effect on the operator that it names.

    Args:
        pattern: the pattern of the override.
        changes: the fields that it sets; their values are valid.
        operators: operands by operator.
        nearest: (operator, operand) pairs that are never dithered.
    """
    operator, _, operand = pattern.rpartition(":")[2].partition(".")
    if operator not in operators:
        return
    operands = [operand] if operand else operators[operator]
    always_nearest = operator in AT_LEAST_8 or all((operator, o) in nearest for o in operands)
    reason = None
    if operator == "checkpoint":
        for field in ("bits", "ranges"):
            if field in changes:
                reason = f"{field}={changes[field]!r} has no effect on a checkpoint's inputs; set checkpoint_inputs"
    elif "checkpoint_inputs" in changes:
        reason = "checkpoint_inputs has an effect on modules and on the operator 'checkpoint' only"
    if changes.get("bits", 8) < 8 and operator in AT_LEAST_8:
        reason = f"bits={changes['bits']} is too few: {operator!r} has at least 8 bits"
    elif changes.get("rounding") == "dither" and always_nearest:
        reason = f"rounding='dither' has no effect on {operator!r}; choose nearest or stochastic"
    if reason is not None:
        raise ValueError(f"Policy.overrides[{pattern!r}]: {reason}")
