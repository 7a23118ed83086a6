"""Writes docs/reference/cli.md: every command of `mesa-train` with its options, from the typer apps.

`python docs/_mkdocs/cli.py` rewrites the page.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mesa_train.cli import app

PAGE = Path(__file__).resolve().parents[1] / "reference/cli.md"
_HEAD = """# Command line

`python docs/_mkdocs/cli.py` makes this page from the commands.

- Tables go to stdout. Progress and errors go to stderr.
- With `--json`, stdout is JSON alone.
- A mistake is one line on stderr, with exit status 2.

`python -m mesa_train.cli` is the same program.
"""


class Parameter(NamedTuple):
    """An argument (names has one word in capitals) or an option."""

    names: tuple[str, ...]
    value: str
    default: str
    help: str


def commands() -> dict[str, Callable[..., Any]]:
    """The functions of the commands by name."""
    found = [c.callback for c in app.registered_commands if c.callback is not None]
    return {command.__name__: command for command in found}


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """The arguments and options of a command, in its order."""
    hints = typing.get_type_hints(command, include_extras=True)
    return [
        _parameter(name, hints[name], given.default)
        for name, given in inspect.signature(command).parameters.items()
    ]


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    kind, about = typing.get_args(hint)[:2]
    optional = [t for t in typing.get_args(kind) if t is not types.NoneType]
    kind = optional[0] if optional else kind
    if default is inspect.Parameter.empty:
        return Parameter((about.metavar,), "text", "required", _line(about.help))
    # typer takes the first declaration for a default where an option has declarations.
    declared = [d for d in (about.default, *(about.param_decls or ())) if isinstance(d, str)]
    names = tuple(declared) or (f"--{name.replace('_', '-')}",)
    if default is None or default is False:
        text = ""
    else:
        text = f"`{getattr(default, 'value', default)}`"
    return Parameter(names, _value(kind, about.min), text, _line(about.help))


def _value(kind: Any, least: float | None) -> str:
    if kind is bool:
        return "flag"
    if issubclass(kind, enum.Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    word = {int: "integer", float: "number", Path: "path"}.get(kind, "text")
    return word if least is None else f"{word}, at least {least:g}"


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def markdown() -> str:
    """The page."""
    parts = [_HEAD]
    for name, command in commands().items():
        parts += [f"## mesa-train {name}", "", _line(inspect.getdoc(command)), ""]
        parts += ["| argument or option | value | default | meaning |", "| --- | --- | --- | --- |"]
        for names, *cells in parameters(command):
            shown = ", ".join(f"`{n}`" for n in names)
            parts.append(f"| {' | '.join([shown, *cells])} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
