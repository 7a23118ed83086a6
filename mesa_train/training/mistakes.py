"""Errors that a recipe's script prints as one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mesa_train import CaptureError

from . import checkpoints, disk
from .config_schema import ConfigError
from .data.sources import CorruptImage

# Any other error is a bug and shows its traceback.
MISTAKES = (
    ConfigError,
    CaptureError,
    checkpoints.CheckpointError,
    CorruptImage,
    FloatingPointError,
    ImportError,
)


def told_once(error: Exception, name: str) -> str | int:
    """The argument of `sys.exit` after an error.

    It is the line on the first process, and the status 1 on other processes.

    All processes have the same line. Only one process meets an image that cannot be decoded, so
    that process prints the line.

    Args:
        error: the error.
        name: of the recipe, which begins the line.
    """
    line = " ".join(str(error).split())
    alone = isinstance(error, CorruptImage)
    return f"{name}: {line}" if alone or int(os.environ.get("RANK", "0")) == 0 else 1


@contextlib.contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """End the script with one line if the block raises one of `MISTAKES`.

    If another process has ended, the script ends without a line, because that process has printed
    the reason.

    Args:
        name: of the recipe, which begins the line.
    Raises:
        SystemExit: instead of these errors.
    """
    try:
        yield
    except MISTAKES as error:
        raise SystemExit(told_once(error, name)) from None
    except RuntimeError as error:
        if not disk.peer_ended(error):
            raise
        raise SystemExit(1) from None
