"""Command lines of the recipes' training scripts: a dry run, a new run, or a continued one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .mistakes import in_one_line

# Options of every training script.
Changes = Annotated[list[str], typer.Option(help="section.key=value, any number.")]
Resume = Annotated[str, typer.Option(help="auto, or the path of a checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes of a dry run.")]


@dataclass(frozen=True)
class TrainingCommand:
    """The functions of a recipe, for its command line.

    Attributes:
        name: of the folder under recipes; it begins every error message.
        load: from a YAML file and `section.key=value` changes to a checked configuration.
        plan: text of a dry run, from a configuration and the number of processes.
        prepare: from a configuration to a run, which has `accelerator`, `done` and `out`.
        resume: from a run and the option `--resume` to true if the run continues.
        describe: text about a run.
        fit: trains a run to its end and returns its scores as text, perhaps empty.
        about: the help text; default: a line that names the recipe's README.
    """

    name: str
    load: Callable[[Path, Sequence[str]], Any]
    plan: Callable[[Any, int], str]
    prepare: Callable[[Any], Any]
    resume: Callable[[Any, str], bool]
    describe: Callable[[Any], str]
    fit: Callable[[Any], str]
    about: str = "Train a model"


def train_from(
    command: TrainingCommand,
    config: Path,
    changes: Sequence[str] = (),
    *,
    resume: str = "",
    dry_run: bool = False,
    processes: int = 1,
) -> None:
    """Train as a configuration says, and print what happens.

    Args:
        command: of the recipe.
        config: YAML file.
        changes: `section.key=value`, any number.
        resume: "auto", the path of a checkpoint, or "" for a new run.
        dry_run: print the plan and stop.
        processes: of a dry run.
    Raises:
        SystemExit: a mistake of the user, with one line.
    """
    log_lines()
    with in_one_line(command.name):
        settings = command.load(config, changes)
        if dry_run:
            print(command.plan(settings, processes))  # noqa: T201
            return
        run = command.prepare(settings)
        if command.resume(run, resume):
            run.accelerator.print(f"continues after step {run.done}")
        run.accelerator.print(command.describe(run), flush=True)
        scores = command.fit(run)
        run.accelerator.print(f"{scores or 'done'}; all of it in {run.out}")
        run.accelerator.wait_for_everyone()


def script(command: TrainingCommand) -> typer.Typer:
    """The command line of a recipe. Returns the application, which a training script calls."""

    def main(
        config: Annotated[Path, typer.Option(help=f"YAML file; recipes/{command.name} has some.")],
        set: Changes = [],  # noqa: B006
        resume: Resume = "",
        dry_run: DryRun = False,
        processes: Processes = 1,
    ) -> None:
        train_from(command, config, set, resume=resume, dry_run=dry_run, processes=processes)

    return application(f"{command.about}; see recipes/{command.name}/README.md.", main)


def application(about: str, main: Callable[..., None]) -> typer.Typer:
    """The application of one command.

    Args:
        about: the help text.
        main: a function with typer's options.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=about)(main)
    return app


def log_lines() -> None:
    """Print warnings of the log as one line each."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
