"""Write docs/reference/cli.md: the commands of `mesa-train` with their options, from the typer app.

`python docs/_mkdocs/cli.py` writes the page.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from mesa_train.cli import app

PAGE = Path(__file__).resolve().parents[1] / "reference/cli.md"
_HEAD = """# Command line

`python docs/_mkdocs/cli.py` generates this page from the commands.

- Tables go to stdout. Progress and errors go to stderr.
- With `--json`, stdout has only JSON.
- After a mistake, a command prints one line on stderr and ends with exit status 2.

`python -m mesa_train.cli` runs the same program.
"""


class Parameter(NamedTuple):
    """An argument or an option.

    Args:
        names: the names of an option, or the one name of an argument in capitals.
        value: kind of the value.
        default: the default in Markdown; empty if there is none.
        help: the help text.
    """

    names: tuple[str, ...]
    value: str
    default: str
    help: str


def commands() -> dict[str, Callable[..., Any]]:
    """The functions of the commands by name."""
    callbacks = [c.callback for c in app.registered_commands if c.callback is not None]
    return {command.__name__: command for command in callbacks}


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """The arguments and options of a command, in its order."""
    hints = typing.get_type_hints(command, include_extras=True)
    return [
        _parameter(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(command).parameters.items()
        if hints[name] is not typer.Context
    ]


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    kind, info = typing.get_args(hint)[:2]
    kinds = [t for t in typing.get_args(kind) if t is not types.NoneType]
    kind = kinds[0] if kinds else kind
    if default is inspect.Parameter.empty:
        return Parameter((info.metavar,), "text", "required", _line(info.help))
    # With `typer.Option("--name", ...)`, typer stores the first name as `default`.
    declarations = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
    names = tuple(declarations) or (f"--{name.replace('_', '-')}",)
    if default is None or default is False:
        text = ""
    else:
        text = f"`{getattr(default, 'value', default)}`"
    return Parameter(names, _value(kind, info.min), text, _line(info.help))


def _value(kind: Any, minimum: float | None) -> str:
    if kind is bool:
        return "flag"
    if issubclass(kind, enum.Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    word = {int: "integer", float: "number", Path: "path"}.get(kind, "text")
    return word if minimum is None else f"{word}, at least {minimum:g}"


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def markdown() -> str:
    """Return the page as Markdown."""
    parts = [_HEAD]
    for name, command in commands().items():
        parts += [f"## mesa-train {name}", "", _line(inspect.getdoc(command)), ""]
        parts += ["| argument or option | value | default | meaning |", "| --- | --- | --- | --- |"]
        for names, *cells in parameters(command):
            names_text = ", ".join(f"`{n}`" for n in names)
            parts.append(f"| {' | '.join([names_text, *cells])} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
