"""`mesa-train`: measure the saved tensors of a model from the command line.

* `compare` measures methods side by side;
* `profile` shows where the bytes are;
* `plan` fits a model into a budget;
* `run` runs a training script with its model wrapped;
* `estimate` shows which ways to train fit on several GPUs.

Tables go to stdout, progress and errors to stderr; with --json, stdout is JSON alone. A command
imports its packages when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from .compare import compare
from .estimate import estimate
from .plan import plan
from .profile import profile
from .run import SETTINGS, run

# Set before PyTorch is imported: its profiler writes to stderr about GPUs that it does not find.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class _OneLine(TyperGroup):
    """Reports a mistyped option or command in one line, like all other user errors."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; with standalone_mode, end the process with its exit code."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", "mesa-train")
            message = " ".join(error.format_message().split())
            typer.echo(f"mesa-train: {message} (see {path} --help)", err=True)
            sys.exit(2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="mesa-train",
    cls=_OneLine,
    help="Show, compare and plan the memory that a model saves for its backward.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Show, compare and plan the memory that a model saves for its backward."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (compare, profile, plan, estimate):
    app.command()(_command)
app.command(context_settings=SETTINGS)(run)
