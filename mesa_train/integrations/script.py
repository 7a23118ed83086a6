"""Run a training script, untouched, with its models wrapped (`mesa-train run`)."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mesa_train.measure.out_of_memory import OutOfMemoryNotes
from mesa_train.policy import Policy

from .finder import ModelFinder


def check_script(script: str, module: bool = False) -> None:
    """Check that a script exists.

    Raises:
        ValueError: there is no such file or module.
    """
    if module:
        # As `python -m` does, from the current folder.
        known = importlib.util.find_spec(script.partition(".")[0]) is not None
        if not known and not Path(script.replace(".", "/")).with_suffix(".py").is_file():
            raise ValueError(f"SCRIPT: no module {script}")
    elif not Path(script).is_file():
        raise ValueError(f"SCRIPT: no file {script}; for a module use --module")


def run_script(
    script: str,
    arguments: Sequence[str],
    policy: Policy,
    *,
    module: bool = False,
    model: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ModelFinder:
    """Run a script as Python would, and wrap the models that its optimizers take.

    `sys.argv`, `sys.path` and the hooks of `ModelFinder` are as before afterwards.

    Args:
        script: path of a Python file, or the name of a module.
        arguments: its command line.
        policy: the policy for all models.
        module: `script` names a module, as for `python -m`.
        model: the class name of the model to wrap; None for the outermost module.
        say: called with lines for the user, in the first process of a node alone.

    Returns:
        The finder, with the models that were wrapped.

    Raises:
        ValueError: there is no such file or module.
        AmbiguousModel: it is not clear which module is the model.
    """
    check_script(script, module)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    notes = OutOfMemoryNotes()
    finder = ModelFinder(policy, say if first else lambda _: None, model, notes.watch)
    argv, path = sys.argv, list(sys.path)
    # As Python does: the script's folder, or for a module the current folder.
    folder = str(Path.cwd()) if module else str(Path(script).resolve().parent)
    sys.argv, sys.path[:] = [script, *arguments], [folder, *path]
    try:
        with finder.watching():
            if module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
    except Exception as error:
        notes.explain(error)
        raise
    finally:
        notes.stop()
        sys.argv, sys.path[:] = argv, path
    return finder
