"""Store measurements as JSON lines: one complete row a measurement, to be read years later.

A row has the versions, the commit and the machine of its measurement. Tables and plots in the docs
are made from these files alone.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .precision import probe

Row = dict[str, Any]

_REPOSITORY = Path(__file__).resolve().parents[2]


def append(path: Path, *rows: Mapping[str, Any]) -> None:
    """Append rows to a JSON-lines file and make its folder.

    If an interrupted run left an incomplete last line, that line is removed first.

    Raises:
        OSError: the file cannot be written; the error names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with path.open("a+b") as file:
            file.seek(0)
            complete = file.read().rfind(b"\n") + 1
            file.truncate(complete)
            file.write(text.encode())
    except OSError as error:
        # The error of a write to an open file does not have the file's name.
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


# New names of columns by the names in older rows.
_RENAMED = {
    "kept_bytes": "saved_bytes",
    "moved_bytes": "offloaded_bytes",
    "kept_per_image": "saved_per_image",
    "moved_per_image": "offloaded_per_image",
    "kept_ratio": "saved_ratio",
    "mesa8_kept_bytes": "mesa8_saved_bytes",
    "standing_bytes": "static_bytes",
    # A key of `by_operator`.
    "copies in main memory": "copies in CPU memory",
}


def read(path: Path) -> list[Row]:
    """Read all rows of a JSON-lines file; none if there is no such file.

    An incomplete last line of an interrupted run is left out. Renamed columns get their new names.

    Raises:
        ValueError: another line is broken.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_renamed(json.loads(line)))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def _renamed(value: Any) -> Any:
    """A row with the new names of its columns, nested columns included."""
    if isinstance(value, dict):
        return {_RENAMED.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def provenance(device: str | torch.device = "cpu") -> Row:
    """The machine and versions of a measurement.

    Returns:
        Device, a CPU's widest arithmetic, threads, number of CPUs, versions, commit and UTC date.
    """
    device = torch.device(device)
    return {
        "device": _device_name(device.type),
        **({"arithmetic": _arithmetic()} if device.type == "cpu" else {}),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": _versions(("mesa_train", "torch", "timm", "triton")),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def group_by(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by the values of `keys`; the order of first appearance stays."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


@cache
def _arithmetic() -> str:
    """A CPU's vector instructions, and whether it computes in bfloat16: "AVX2, no bfloat16"."""
    native = probe("cpu").bf16
    return f"{torch.backends.cpu.get_cpu_capability()}, {'' if native else 'no '}bfloat16"


@cache
def _device_name(device_type: str) -> str:
    """The model name of the GPU or the processor."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python and of the installed packages among `packages`."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def _commit() -> str:
    """Short hash of the checkout, "-dirty" if tracked files differ; "unknown" without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "mesa_train")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
