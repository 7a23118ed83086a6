"""`mesa-train`: what a model keeps for its backward, from the command line.

compare puts methods side by side; profile shows where the bytes are; plan fits a model into a
budget; estimate answers what fits on several GPUs. Tables go to stdout, progress and errors to
stderr; with --json stdout is JSON alone. What a command needs is imported when it runs, so that
--help is quick.
"""

from __future__ import annotations

import typer

from mesa_train.cli.compare import compare
from mesa_train.cli.estimate import estimate
from mesa_train.cli.plan import plan
from mesa_train.cli.profile import profile

app = typer.Typer(
    name="mesa-train",
    help="See, compare and plan what a model keeps for its backward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """See, compare and plan what a model keeps for its backward."""


for _command in (compare, profile, plan, estimate):
    app.command()(_command)
