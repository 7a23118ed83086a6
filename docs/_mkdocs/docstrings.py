"""An extension of griffe: `name: text` lines of a docstring, for an argument or a field, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)
# `to_dict` of text such as "bits=32" stays; what is no Markdown of ours is left alone.


class ArgumentLists(griffe.Extension):
    """Reads the arguments of functions and the fields of classes."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a function or class."""
        if obj.docstring is None or not (obj.is_function or obj.is_class):
            return
        names = {p.name for p in getattr(obj, "parameters", ())} | set(obj.members)

        def entry(found: re.Match[str]) -> str:
            if not set(found[1].split(", ")) <= names:
                return found[0]
            return f"- `{found[1].replace(', ', '`, `')}`: "

        lines: list[str] = []
        for line in obj.docstring.value.splitlines():
            changed = _ENTRY.sub(entry, line)
            # Markdown needs an empty line in front of a list.
            if changed != line and lines and lines[-1] and not lines[-1].startswith(("- ", " ")):
                lines.append("")
            if lines and lines[-1].startswith(("- ", "  ")) and line and not line.startswith(" "):
                lines.append("") if changed == line else None
            lines.append(changed)
        obj.docstring.value = "\n".join(lines)
