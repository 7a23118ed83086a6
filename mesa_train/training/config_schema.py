"""Configurations of recipes: frozen dataclasses, read from YAML and changed by `section.key=value`.

The annotation of a field has its type and its checks:

    lr: Annotated[float, POSITIVE] = 5e-4
    name: Annotated[str, OneOf(("adamw", "adamw8bit"))] = "adamw"

The type decides how a value is read. An unquoted value counts as its text (`yaml_text.py`): in a
text field, `no`, `off`, `2024` and `1:30` are text. Checks that need several fields are in a method
`check` of the dataclass. A mistake gives one line with the key, the value and the choices.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mesa_train.policy import OFFLOADED, PRESETS
from mesa_train.utils import yaml_text
from mesa_train.utils.yaml_text import Plain


class ConfigError(ValueError):
    """A mistake in a recipe's configuration. The message is one line."""


# A check of one field. It gets the dotted name and the value, and raises ConfigError.
Check = Callable[[str, Any], None]


@dataclass(frozen=True)
class Bounds:
    """Check of a number, or of every number of a list.

    Attributes:
        text: what the value must be, for the message.
        holds: True for an allowed number. It must be False for nan.
    """

    text: str
    holds: Callable[[float], bool]

    def __call__(self, name: str, value: Any) -> None:
        numbers = list(value) if isinstance(value, tuple) else [value]
        if not all(self.holds(number) for number in numbers):
            shown = numbers if isinstance(value, tuple) else value
            raise ConfigError(f"{name} must {self.text}, got {shown}")


POSITIVE = Bounds("be positive", lambda number: 0 < number < math.inf)
NOT_NEGATIVE = Bounds("not be negative", lambda number: number >= 0)
SHARE = Bounds("lie in [0, 1)", lambda number: 0 <= number < 1)
PROBABILITY = Bounds("lie in [0, 1]", lambda number: 0 <= number <= 1)


@dataclass(frozen=True)
class Range:
    """Check of a pair (low, high): 0 < low <= high <= most.

    Attributes:
        most: default: no bound.
    """

    most: float = math.inf

    def __call__(self, name: str, value: tuple[float, float]) -> None:
        low, high = value
        if not 0 < low <= high <= self.most:
            raise ConfigError(
                f"{name} must be a range within 0 and {self.most:g}, got {list(value)}"
            )


@dataclass(frozen=True)
class OneOf:
    """Check of a text. The message has the choices and the closest one.

    Attributes:
        choices: the allowed texts.
    """

    choices: Iterable[str]

    def __call__(self, name: str, value: str) -> None:
        choices = list(self.choices)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


POLICY = OneOf(("plain", *PRESETS, *OFFLOADED))


C = TypeVar("C", bound="Configuration")


@dataclass(frozen=True)
class Configuration:
    """Base of a recipe's configuration, whose fields are sections: one dataclass for each topic."""

    @classmethod
    def load(cls: type[C], path: str | Path, changes: Sequence[str] = ()) -> C:
        """Read a YAML file, apply `section.key=value` changes and check every value.

        Raises:
            ConfigError: a key or a value is wrong.
        """
        return cls.of_dict(read_yaml(path, changes))

    @classmethod
    def of_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build and check a configuration from nested plain values.

        Raises:
            ConfigError: a key or a value is wrong.
        """
        made: C = of_values(cls, values)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the YAML."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""


def read_yaml(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read the sections of a YAML file and apply changes.

    Args:
        path: the YAML file.
        changes: texts of the form `section.key=value`.
    Returns:
        Nested values, by section and key.
    Raises:
        ConfigError: the file is missing, is not YAML or holds no sections, or a change is
            malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    import yaml

    try:
        values = yaml_text.read(path.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if values is None or (isinstance(values, Plain) and yaml_text.is_null(values)):
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections, got {type(values).__name__}")
    return changed(values, changes)


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply changes of the form `section.key=value` to nested values, in place.

    Returns:
        `values`.
    Raises:
        ConfigError: a change does not have that form.
    """
    import yaml

    for change in changes:
        name, equals, text = change.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ConfigError(f"--set takes section.key=value, got {change!r}")
        try:
            value = yaml_text.read(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"--set {name}: {text!r} is not a YAML value; put text in quotes"
            ) from None
        if value is None or isinstance(value, Plain):
            # The text is empty or a scalar. A command line has no comments and no anchors: `a #1`
            # is a folder.
            value = Plain(text.strip())
        within = values.setdefault(section, {})
        if isinstance(within, Plain) and yaml_text.is_null(within):
            within = values[section] = {}
        if not isinstance(within, dict):
            raise ConfigError(f"{section} must be a section of keys, got {_shown(within)}")
        within[key] = value
    return values


def of_values(schema: Any, values: Any, prefix: str = "") -> Any:
    """Build a dataclass from nested plain values and check it. Its sections may be dataclasses too.

    Args:
        schema: the dataclass.
        values: values by field name.
        prefix: the section's name and a dot, for messages.
    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or fails a check.
    """
    if isinstance(values, Plain) and yaml_text.is_null(values):
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} must be a section of keys, got {_shown(values)}")
    hints = typing.get_type_hints(schema, include_extras=True)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3)
            rest = f"did you mean {', '.join(near)}?" if near else f"keys: {', '.join(hints)}"
            raise ConfigError(f"unknown key {prefix}{key}; {rest}")
    given: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            given[key] = of_values(hints[key], value, f"{prefix}{key}.")
        else:
            kind, checks = _parts(hints[key])
            given[key] = _typed(kind, value, prefix + key)
            _run(checks, prefix + key, given[key])
    built = schema(**given)
    if hasattr(built, "check"):
        built.check()
    return built


def check_fields(config: Any) -> None:
    """Run the checks in the annotations of a dataclass that was built by its constructor.

    Raises:
        ConfigError: names the first field whose value fails a check.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        _run(_parts(hint)[1], name, getattr(config, name))


def _parts(hint: Any) -> tuple[Any, tuple[Check, ...]]:
    """The type and the checks of an annotation."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, ()
    kind, *checks = typing.get_args(hint)
    return kind, tuple(checks)


def _run(checks: Iterable[Check], name: str, value: Any) -> None:
    """Run the checks of a field. None, in a field that may be null, needs no check."""
    if value is not None:
        for check in checks:
            check(name, value)


def _typed(kind: Any, value: Any, name: str) -> Any:
    """Convert `value`, from YAML or plain Python, to `kind`. ConfigError if it does not fit."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kind = options[0]
    # The empty text is null in a field that may be null, and "" in a text field.
    null = value is None or (isinstance(value, Plain) and yaml_text.is_null(value))
    if null and type(None) in options:
        return None
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_typed(p, v, name) for p, v in zip(parts, value, strict=True))
        raise ConfigError(f"{name} must be a list of {len(parts)} numbers, got {_shown(value)}")
    if isinstance(value, Plain):
        found = _of_text(kind, value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        found = yaml_text.to_float(value) if isinstance(value, str) else float(value)
    else:
        right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        found = value if right else None
    if found is None:
        raise ConfigError(
            f"{name} must be {kind.__name__}, got {_shown(value)}{_remedy(kind, value)}"
        )
    return found


def _of_text(kind: Any, text: Plain) -> Any:
    """Convert an unquoted scalar to a field's type; None if that is not possible.

    A text field refuses `null`, because a user who writes `null` usually means no value.
    """
    if kind is str:
        return None if text and yaml_text.is_null(text) else str(text)
    readers: dict[Any, Any] = {
        bool: yaml_text.to_bool, int: yaml_text.to_int, float: yaml_text.to_float,
    }  # fmt: skip
    return readers[kind](text)


def _shown(value: Any) -> str:
    """Format a value for an error message.

    Numbers, booleans and null appear as Python writes them, text in quotes.
    """
    plain = yaml_text.resolved(value)
    if isinstance(value, Plain) and isinstance(plain, int | float) and not isinstance(plain, bool):
        return str(value)
    return repr(plain)


def _remedy(kind: Any, value: Any) -> str:
    """A hint about the correct spelling; "" if the name of the field's type is enough."""
    if kind is str and (value is None or isinstance(value, Plain)):
        return '; write "" for none, or the word in quotes'
    if kind in (int, float) and isinstance(value, str):
        text = str(value)
        if not isinstance(value, Plain) and yaml_text.to_float(text) is not None:
            return "; a number is written without quotes"
        if text.lstrip("+-").isdigit() and len(text) > 1:
            return "; a number has no leading zeros"
    return ""
