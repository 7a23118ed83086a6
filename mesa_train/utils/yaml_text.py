"""Read YAML with unquoted values as written, so that a schema can read them by each field's type.

PyYAML reads `no` and `off` as False, `2024` as a number, `010` as 8, `1:30` as 90 and `1e-4` as
text. Here an unquoted scalar is a `Plain`. A text field takes it unchanged; a number field takes it
as a number (`resolved`). Keys are always text. A repeated key is an error; PyYAML takes the last
one. Needs PyYAML, which is imported on use.
"""

from __future__ import annotations

import re
from collections.abc import Container, Hashable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_SPECIAL = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)
# 010 is 8 in YAML 1.1 and 10 in YAML 1.2. So it stays text.
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class Plain(str):
    """An unquoted scalar, as written."""


def read(text: str | bytes) -> Any:
    """Read YAML into nested dicts and lists.

    Returns:
        Values: `Plain`, text that was quoted, and values with an explicit tag.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key is repeated.
    """
    import yaml

    return yaml.load(text, _loader())  # Loader is a SafeLoader.


def resolved(value: Any) -> Any:
    """Convert values as YAML means them: None, bool, int, float, or else text.

    `1e-4` is a number; `010` and `1:30` stay text.

    Args:
        value: the result of `read`; keys do not change.
    """
    if isinstance(value, dict):
        return {key: resolved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner) for inner in value]
    if not isinstance(value, Plain):
        return value
    if is_null(value):
        return None
    for kind in (to_bool, to_int, to_float):
        converted = kind(value)
        if converted is not None:
            return converted
    return str(value)


def by_field(fields: dict[str, Any], texts: Container[str]) -> dict[str, Any]:
    """Convert nested fields: as written if named in `texts`, else `resolved`.

    Args:
        fields: nested fields from `read`.
        texts: names of the text fields, and of lists of texts.
    """
    return {
        name: by_field(value, texts)
        if isinstance(value, dict)
        else _as_written(value)
        if name in texts
        else resolved(value)
        for name, value in fields.items()
    }


def _as_written(value: Any) -> Any:
    """A value with every scalar as text."""
    if isinstance(value, list):
        return [_as_written(inner) for inner in value]
    return str(value) if isinstance(value, str) else value


def is_null(text: Plain) -> bool:
    """True if a scalar is YAML's null."""
    return str(text) in _NULL


def to_bool(text: str) -> bool | None:
    """Read true, yes, on, false, no, off; None for others.

    The word is in lower case, in capitals or with a capital.
    """
    if text not in (text.lower(), text.upper(), text.capitalize()):
        return None
    word = text.lower()
    return True if word in _TRUE else False if word in _FALSE else None


def to_int(text: str) -> int | None:
    """Read a decimal, 0x, 0o or 0b number, with underscores between digits.

    Returns None for others and for leading zeros.
    """
    try:
        return int(text, 0)
    except ValueError:
        return None


def to_float(text: str) -> float | None:
    """Read any decimal number, .inf and .nan.

    Returns None for others and for integers with leading zeros.
    """
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    if _LEADING_ZERO.fullmatch(text):
        return None
    try:
        return float(text)
    except ValueError:
        integer = to_int(text)
        return None if integer is None else float(integer)


@cache
def _loader() -> type[yaml.SafeLoader]:
    """The class of the loader, made once."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader without its rules for unquoted scalars: every scalar is text."""

        # Merges with `<<` stay; no other value is recognised by its form.
        yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

        def construct_mapping(
            self, node: yaml.MappingNode, deep: bool = False
        ) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value!r} is given twice", key.start_mark
                        )
                    seen.add(key.value)
            mapping = super().construct_mapping(node, deep)
            return {str(k) if isinstance(k, Plain) else k: v for k, v in mapping.items()}

    def text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        written = loader.construct_scalar(node)
        return Plain(written) if node.style is None and node.tag == _TEXT else str(written)

    # The tag of text without another rule. `!!str no` has it too, and is text in both cases.
    Loader.add_constructor(_TEXT, text)
    return Loader


_TEXT = "tag:yaml.org,2002:str"
