"""Atomic checkpoints: a checkpoint is either complete or absent.

A checkpoint is a folder `step-00000120`. It holds Accelerate's state (weights in safetensors,
optimizer, scaler) and `state.json` (position, best accuracy, the model's keys and shapes).
`manifest.json` lists the size and SHA-256 of every file, and is written last.

The files are first written to a folder `.partial-...` and synced. Then the folder is renamed and
the symbolic link `last` is moved to it. A process killed in the middle leaves a `.partial-...`
folder, which is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .config_schema import ConfigError
from .disk import CheckpointError as CheckpointError
from .disk import reading, reason, remove, writing

MANIFEST, STATE, PARTIAL = "manifest.json", "state.json", ".partial-"
_log = logging.getLogger(__name__)


def partial(folder: Path, step: int) -> Path:
    """The folder in which the checkpoint of `step` is written before it is complete."""
    return folder / f"{PARTIAL}step-{step:08d}"


def clear(written: Path) -> None:
    """Empty the folder in which a checkpoint is about to be written."""
    remove(written)
    written.mkdir(parents=True)


def commit(written: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Complete a partial checkpoint, point `last` at it, and remove old checkpoints.

    Args:
        written: the partial folder, with all files but the state and the manifest.
        state: contents of `state.json`.
        keep: how many of the newest checkpoints stay.
    Returns:
        The folder of the complete checkpoint.
    """
    folder = written.parent
    (written / STATE).write_text(json.dumps(state))
    files = {
        str(path.relative_to(written)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    for name in files:
        _sync(written / name)
    (written / MANIFEST).write_text(json.dumps(files, indent=1))
    _sync(written / MANIFEST)
    final = folder / written.name.removeprefix(PARTIAL)
    remove(final)
    written.rename(final)
    link = folder / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(folder / "last")
    _sync(folder)
    for old in complete(folder)[:-keep]:
        remove(old)
    return final


def complete(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder by name, oldest first. Reads no file."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest and read the state.

    Returns:
        The contents of `state.json`.
    Raises:
        CheckpointError: names the file that is missing, truncated or changed.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint of mesa_train: it has no {MANIFEST}")
    try:
        files = json.loads(manifest.read_text())
        items = [
            (checkpoint / name, entry["bytes"], entry["sha256"]) for name, entry in files.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{manifest} is damaged: it lists no files") from None
    except OSError as error:
        raise CheckpointError(f"{manifest} cannot be read ({reason(error)})") from None
    for path, size, digest in items:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} is truncated: {path.stat().st_size} bytes of {size}"
                if path.stat().st_size < size
                else f"{path} has changed: {path.stat().st_size} bytes instead of {size}"
            )
        with reading(path):
            written = _digest(path)
        if written != digest:
            raise CheckpointError(f"{path} has changed since it was written (SHA-256 differs)")
    with reading(checkpoint / STATE):
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint / STATE} is damaged: it holds no mapping")
    return state


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest usable checkpoint and its state. Damaged checkpoints are logged and skipped.

    Returns:
        (checkpoint folder, state), or None if there is no usable checkpoint.
    """
    for left in folder.glob(f"{PARTIAL}*"):
        _log.warning("%s was cut short while being written; it is not used", left)
    for checkpoint in reversed(complete(folder)):
        try:
            return checkpoint, verify(checkpoint)
        except CheckpointError as error:
            _log.warning("%s; trying the one before", error)
    return None


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every key of the state dict."""
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def check_keys(name: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that two state dicts have the same keys and shapes.

    Args:
        name: the checkpoint or file, for the message.
        found: shapes by key, as read.
        wanted: shapes by key, as the model has them.
    Raises:
        CheckpointError: names up to five keys of each kind (missing, unexpected, of another shape
            with both shapes).
    """
    other = {
        key: f"{key} {tuple(found[key])} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in found and tuple(found[key]) != tuple(shape)
    }
    problems = []
    for label, keys in (
        ("missing", [key for key in wanted if key not in found]),
        ("unexpected", [key for key in found if key not in wanted]),
        ("of another shape", list(other.values())),
    ):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{label}: {shown}")
    if problems:
        raise CheckpointError(f"{name} is of another model; {'; '.join(problems)}")


def check_images(checkpoint: Path, state: Mapping[str, Any], images: int) -> None:
    """Check that a checkpoint was trained on as many images as the run that continues it.

    An epoch would otherwise have another number of steps. Older checkpoints lack the number.

    Args:
        checkpoint: for the message.
        state: of the checkpoint; "images" has the number.
        images: training images of the run.
    Raises:
        ConfigError: the numbers differ.
    """
    before = state.get("images", images)
    if before != images:
        raise ConfigError(
            f"data: {images} training images, but {checkpoint} was trained on {before}; its epochs "
            "cannot be continued on another data set: choose another train.out, and model.weights "
            "to start from its weights"
        )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into `model`.

    Raises:
        CheckpointError: names the file and the keys that do not fit.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError or an error of torch's
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from None
    check_keys(path, {key: value.shape for key, value in weights.items()}, shapes(model))
    model.load_state_dict(weights)


def save_weights(path: Path, weights: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: the old file stays until the new one is complete.

    Args:
        path: the file.
        weights: tensors by key.
        about: metadata of the file.
    Raises:
        CheckpointError: the file cannot be written; names `path`.
    """
    from safetensors.torch import save_file

    written = beside(path)
    with writing(path, written):
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()},
            written,
            dict(about),
        )
        _sync(written)
        written.replace(path)


def beside(path: Path) -> Path:
    """The path at which a file is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def _digest(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Sync a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
