"""An extension of griffe: lines `name: text` of a docstring become a list of arguments or fields."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ")


class ArgumentLists(griffe.Extension):
    """Changes the docstrings of functions and classes; other lines stay."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Arguments of a function."""
        _change(func, {p.name for p in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Fields of a class, or arguments of its constructor."""
        init = cls.members.get("__init__")
        _change(cls, {*cls.members, *(p.name for p in getattr(init, "parameters", ()))})


def _change(obj: griffe.Object, names: set[str]) -> None:
    if obj.docstring is None:
        return
    lines: list[str] = []
    inside = False
    for line in obj.docstring.value.splitlines():
        match = _ENTRY.match(line)
        if match is not None and set(match[1].split(", ")) <= names:
            if not inside and lines and lines[-1]:
                lines.append("")  # Markdown needs an empty line before a list
            inside = True
            line = f"- `{match[1].replace(', ', '`, `')}`: {line[match.end() :]}"
        elif inside and line and not line.startswith(" "):
            line = f"    {line}"
        elif not line:
            inside = False
        lines.append(line)
    obj.docstring.value = "\n".join(lines)
