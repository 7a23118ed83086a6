"""`mesa-train run`: run a training script as it is, with its model wrapped."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
SETTINGS["allow_interspersed_args"] = False  # options behind SCRIPT are the script's


def run(
    context: typer.Context,
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="A Python file; its own arguments follow.")
    ],
    policy: Annotated[
        str, typer.Option(help="A preset, PRESET+offload, or a policy's YAML file.")
    ] = "mesa8",
    module: Annotated[
        bool, typer.Option("--module", help="SCRIPT is a module's name, as for python -m.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Class name of the model; default: the outermost module."),
    ] = None,
) -> None:
    """Run a training script as it is, with its model wrapped.

    The model is found where an optimizer, DDP, FSDP or Accelerate takes it. One line on stderr says
    which model was wrapped. To start several processes: `torchrun -m mesa_train.cli run SCRIPT`, or
    `accelerate launch -m mesa_train.cli run SCRIPT`.
    """
    with common.one_line_errors():
        from mesa_train.integrations.finder import AmbiguousModel
        from mesa_train.integrations.script import check_script, run_script
        from mesa_train.integrations.setting import policy_of_setting

        chosen = policy_of_setting(policy)
        assert chosen is not None
        check_script(script, module)

    def say(line: str) -> None:
        typer.echo(f"mesa-train run: {line}", err=True)

    try:
        finder = run_script(script, context.args, chosen, module=module, model=model, say=say)
    except AmbiguousModel as error:
        say(str(error))
        raise typer.Exit(2) from None
    if not finder.models:
        say("wrapped nothing: the script gave no module to an optimizer or a parallel wrapper")
