"""Recipes' configurations: frozen dataclasses read from YAML, changed by `section.key=value`.

Whatever is wrong is one line naming the key, the value and the choices.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A mistake in a recipe's configuration, told in one line."""


def read_yaml(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a YAML file after `section.key=value` changes. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections, got {type(values).__name__}")
    return changed(values, changes)


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Nested values after `section.key=value` changes. ConfigError for one that is not of that
    form."""
    for change in changes:
        name, equals, text = change.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ConfigError(f"--set takes section.key=value, got {change!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {name}: {text!r} is not a YAML value") from None
        within = values.setdefault(section, {})
        if not isinstance(within, dict):
            raise ConfigError(f"{section} must be a section of keys, got {within!r}")
        within[key] = value
    return values


def of_values(schema: Any, values: Any, prefix: str = "") -> Any:
    """A dataclass, its sections dataclasses themselves, of nested plain values. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} must be a section of keys, got {values!r}")
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3)
            rest = f"did you mean {', '.join(near)}?" if near else f"keys: {', '.join(hints)}"
            raise ConfigError(f"unknown key {prefix}{key}; {rest}")
    return schema(
        **{
            key: of_values(hints[key], value, f"{prefix}{key}.")
            if dataclasses.is_dataclass(hints[key])
            else _typed(hints[key], value, prefix + key)
            for key, value in values.items()
        }
    )


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`; YAML reads 5e-4 as text, so numbers in text are taken."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_typed(p, v, name) for p, v in zip(parts, value, strict=True))
        raise ConfigError(f"{name} must be a list of {len(parts)} numbers, got {value!r}")
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """ConfigError, with the closest choice, if `value` is none of them."""
    if value not in choices:
        near = difflib.get_close_matches(value, list(choices), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def positive(name: str, value: float) -> None:
    """ConfigError unless value > 0."""
    if value <= 0:
        raise ConfigError(f"{name} must be positive, got {value}")
