"""Shorten an error to one line: the message, and the line of the user's own file that raised it."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    Path(folder).resolve() for folder in {*sysconfig.get_paths().values()} if "lib" in folder
)
# Most characters of a message that is not from mesa_train.
_MAX_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """The first line of an error's message.

    If the error passed through the user's code, the line has its type, and the user's file and
    line.
    """
    text = str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    location = place(error)
    if not location:
        return line if text else type(error).__name__
    return f"{type(error).__name__}: {line[:_MAX_CHARACTERS]} ({location})"


def place(error: BaseException) -> str:
    """The last line of the user's own code that an error passed through: `my_model.py, line 23`.

    Returns "" if there is none.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_file():
            continue
        path = path.resolve()
        if _PACKAGE in path.parents or any(folder in path.parents for folder in _LIBRARIES):
            continue
        return f"{path.name}, line {frame.lineno}"
    return ""
