"""Errors of reading and writing a run's files: each becomes one line with the path.

A full disk raises a different type in each library: OSError in Python, RuntimeError in torch.save,
SafetensorError in safetensors, BaseException in torch.distributed.checkpoint. Damaged files raise
as many types. Therefore any exception during a read or a write counts as an error of the file.

A checkpoint that could not be written is removed. The error names the last complete checkpoint. All
ranks learn of one rank's failure, so that no rank waits for it. A rank whose write fails still
takes part in the collectives of the other ranks (`to_the_end`). If it left, the others would wait,
or would run a different collective than this rank.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mesa_train.utils import records

_log = logging.getLogger(__name__)
Gather = Callable[[list[str]], list[str]]


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written. The message names the file or the keys."""


def failures() -> tuple[type[BaseException], ...]:
    """The exception types of a failed read or write. KeyboardInterrupt is not one of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    return Exception, CheckpointException


def reason(error: BaseException) -> str:
    """The reason of an error in one line.

    An error of the operating system gives the system's own text. Others give the exception's text.
    """
    inner = getattr(error, "failures", None)
    if isinstance(inner, dict) and inner:  # failures by rank: (error, stack)
        error = next(iter(inner.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    # C++ errors have many lines; the first one names the error.
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[0].split())[:200] if lines else ""
    if "inline_container" in text:  # torch.save's message names positions in its archive
        return "torch.save could not write all of it"
    known = isinstance(error, CheckpointError) or type(error).__name__ == "SafetensorError"
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any error inside into a CheckpointError that names `path`."""
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
    """Turn any error inside into a CheckpointError that names `path` and the free disk space.

    Args:
        path: the file or folder to write.
        beside: the partial file, which is renamed at the end; removed after an error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except failures() as error:
        # Measured before the removal, which frees space.
        room = _room(Path(path))
        if beside is not None:
            remove(beside)
        raise CheckpointError(f"{path} could not be written ({reason(error)}{room})") from None


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSON-lines file of a run.

    A folder that was removed is not created again, because it may be on a disk that is no longer
    mounted.

    Raises:
        OSError: the run's folder was removed, or the file cannot be written; names the path.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the run's folder was removed", str(path.parent))
    records.append(path, row)


def together(
    step: Callable[[], None], path: Path, partial: Path, gather: Gather, folder: Path | None = None
) -> None:
    """Run one step of a write on every rank. If the step fails on one rank, all ranks raise.

    Args:
        step: writes this rank's part.
        path: the final name of the file or folder.
        partial: the file or folder that is written first; removed after an error.
        gather: joins the lists of all ranks on every rank, in the order of the ranks. The identity
            for one process.
        folder: the folder of checkpoints named `step-*`; default: the folder of `path`.
    Raises:
        CheckpointError: names `path`, the reason and the last complete checkpoint.
    """
    if faults := _faults(writing(path), step, gather):
        remove(partial)
        raise CheckpointError(f"{faults[0]}; {last_good(folder or path.parent)}")


def read_together(step: Callable[[], None], path: Path, gather: Gather) -> None:
    """Run one step of a read on every rank. If the step fails on one rank, all ranks raise.

    Args:
        step: reads this rank's part. It must not wait for another rank.
        path: the file or folder to read.
        gather: as for `together`.
    Raises:
        CheckpointError: names `path` and the reason.
    """
    if faults := _faults(reading(path), step, gather):
        raise CheckpointError(faults[0])


def _faults(
    context: contextlib.AbstractContextManager[None], step: Callable[[], None], gather: Gather
) -> list[str]:
    """The error messages of all ranks on which a step fails."""
    fault = ""
    try:
        with context:
            step()
    except CheckpointError as error:
        fault = str(error)
    return [text for text in gather([fault]) if text]


@contextlib.contextmanager
def to_the_end(model: Any = None) -> Iterator[None]:
    """Context manager: a failed write raises at the end, not in the middle.

    DeepSpeed and Accelerate wait for all ranks between their writes. A rank that raises at a failed
    write meets the other ranks in a different collective: gloo aborts the process, NCCL waits.

    Args:
        model: if it is a DeepSpeed engine, its own writes are included. Other models write through
            `torch.save`.
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
    """Let `owner.name` append its errors to `faults` instead of raising them."""
    own, call = name in vars(owner), getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except failures() as error:
            faults.append(error)
            if name == "save_checkpoint":
                # The barrier at the end of DeepSpeed's `save_checkpoint`, which this rank has not
                # reached.
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
    """Text that names the newest complete checkpoint of a folder."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint is there yet"


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists. A failure is logged as a warning.

    Several ranks may call this at the same time.
    """
    try:
        while path.is_dir() and not path.is_symlink():
            # Another rank may remove a file that this one has listed.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s could not be removed (%s)", path, reason(error))


def forget_after(metrics: Path, step: int) -> None:
    """Remove the rows of steps that will be repeated, after a resume at `step`.

    Does nothing if there is no file, as after a checkpoint before the first row.
    """
    from mesa_train.utils import records

    if not metrics.exists():
        return
    beside = metrics.with_suffix(".partial")
    with reading(metrics):
        rows = [row for row in records.read(metrics) if row["step"] <= step]
    with writing(metrics, beside):
        beside.unlink(missing_ok=True)
        records.append(beside, *rows)
        beside.replace(metrics)


def peer_ended(error: BaseException) -> bool:
    """True if this rank fails because another rank has ended. That rank logs the reason."""
    text = str(error)
    return "by peer" in text and "Connection" in text


def _room(path: Path) -> str:
    """Text with the free disk space at `path`; "" if it is unknown."""
    from mesa_train.utils.formatting import format_bytes

    there: Any = next((p for p in path.absolute().parents if p.exists()), None)
    try:
        return f"; {format_bytes(shutil.disk_usage(there).free)} left on the disk" if there else ""
    except OSError:
        return ""
