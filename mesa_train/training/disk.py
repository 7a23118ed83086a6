"""Failures of reading and writing a run's files, each told in one line with its path.

A full disk is an OSError to Python, a RuntimeError to torch.save, a SafetensorError to safetensors and
a BaseException to torch.distributed.checkpoint; damaged files raise as many types. So any exception
while a file is written or read is taken for the file's. A checkpoint that could not be written is
removed, and the error names the last one that is whole. All ranks learn of a rank's failure, so
that none waits for it. A rank whose write fails still takes part in what all ranks do together
(`to_the_end`): where it left, the others would wait, or meet it in another collective.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
Gather = Callable[[list[str]], list[str]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file or the keys."""


def failures() -> tuple[type[BaseException], ...]:
    """The types of a failure to read or write; a keyboard interrupt is none."""
    from torch.distributed.checkpoint.api import CheckpointException

    return Exception, CheckpointException


def reason(error: BaseException) -> str:
    """Why, in a line: the operating system's words if it was asked, else the exception's."""
    inner = getattr(error, "failures", None)
    if isinstance(inner, dict) and inner:  # torch.distributed.checkpoint: rank to (error, stack)
        error = next(iter(inner.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    # C++ errors go on for many lines; the first says what happened.
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[0].split())[:200] if lines else ""
    if "inline_container" in text:  # torch.save's own words name positions in its archive
        return "torch.save could not write all of it"
    known = isinstance(error, CheckpointError) or type(error).__name__ == "SafetensorError"
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Any failure inside becomes a CheckpointError that names `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except failures() as error:
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or of another run ({reason(error)})"
        ) from None


@contextlib.contextmanager
def writing(path: str | Path, beside: Path | None = None) -> Iterator[None]:
    """Any failure inside becomes a CheckpointError that names `path`, with the room that is left.

    beside: what is written first and renamed at the end; removed after a failure.
    """
    try:
        yield
    except CheckpointError:
        raise
    except failures() as error:
        # Asked before the removal makes room again.
        room = _room(Path(path))
        if beside is not None:
            remove(beside)
        raise CheckpointError(f"{path} could not be written ({reason(error)}{room})") from None


def together(
    step: Callable[[], None], path: Path, partial: Path, gather: Gather, folder: Path | None = None
) -> None:
    """Run a step of writing on every rank; if it fails on one, all raise.

    Args:
        path: what is written, as it will be called.
        partial: what is written first; removed after a failure.
        gather: gives all ranks the lists of all, one after the other; the identity for one process.
        folder: the folder of checkpoints named `step-*`; None for that of `path`.
    Raises:
        CheckpointError: names `path`, the reason, and the last good checkpoint.
    """
    if faults := _faults(writing(path), step, gather):
        remove(partial)
        raise CheckpointError(f"{faults[0]}; {last_good(folder or path.parent)}")


def read_together(step: Callable[[], None], path: Path, gather: Gather) -> None:
    """Run a step of reading on every rank; if it fails on one, all raise.

    Args:
        step: reads this rank's part. It must not wait for another rank.
        path: what is read.
        gather: as for `together`.
    Raises:
        CheckpointError: names `path` and the reason.
    """
    if faults := _faults(reading(path), step, gather):
        raise CheckpointError(faults[0])


def _faults(
    context: contextlib.AbstractContextManager[None], step: Callable[[], None], gather: Gather
) -> list[str]:
    """The errors of all ranks that fail in a step."""
    fault = ""
    try:
        with context:
            step()
    except CheckpointError as error:
        fault = str(error)
    return [text for text in gather([fault]) if text]


@contextlib.contextmanager
def to_the_end(model: Any = None) -> Iterator[None]:
    """Context manager: a write that fails raises at the end, not in the middle.

    DeepSpeed and Accelerate wait for all ranks between their writes. A rank that leaves at a failed write meets the
    others in another collective: gloo aborts the process, NCCL waits.

    Args:
        model: if it is a DeepSpeed engine, its own writes are meant too. Others use `torch.save`.
    """
    import torch

    faults: list[BaseException] = []
    with contextlib.ExitStack() as replaced:
        writes: list[tuple[Any, str]] = [(torch, "save")]
        writer = getattr(model, "checkpoint_engine", None)
        if writer is not None:
            writes += [(writer, name) for name in ("makedirs", "save", "commit")]
            writes += [(model, "_copy_recovery_script"), (model, "save_checkpoint")]
        for owner, name in writes:
            if hasattr(owner, name):
                replaced.enter_context(_late(owner, name, faults))
        yield
    if faults:
        raise faults[0]


@contextlib.contextmanager
def _late(owner: Any, name: str, faults: list[BaseException]) -> Iterator[None]:
    """Let `owner.name` append its failures to `faults` instead of raising them."""
    own, call = name in vars(owner), getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except failures() as error:
            faults.append(error)
            if name == "save_checkpoint":
                # DeepSpeed's last wait, which this rank has not come to.
                import torch.distributed as dist

                dist.barrier()
            return None

    vars(owner)[name] = late
    try:
        yield
    finally:
        if own:
            vars(owner)[name] = call
        else:
            del vars(owner)[name]


def last_good(folder: Path) -> str:
    """The newest complete checkpoint of a folder, in words."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint is there yet"


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a failure is a warning. Ranks may do so at once."""
    try:
        while path.is_dir() and not path.is_symlink():
            # Another rank may remove a file that this one has listed.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s could not be removed (%s)", path, reason(error))


def peer_ended(error: BaseException) -> bool:
    """Whether a rank fails because another one has ended, whose own line says why."""
    text = str(error)
    return "by peer" in text and "Connection" in text


def _room(path: Path) -> str:
    """How much room is left where `path` was to be, in words; "" where that is unknown."""
    from mesa_train.utils.formatting import format_bytes

    there: Any = next((p for p in path.absolute().parents if p.exists()), None)
    try:
        return f"; {format_bytes(shutil.disk_usage(there).free)} left on the disk" if there else ""
    except OSError:
        return ""
