"""Write a comparison to disk: rows when they are measured, then sorted rows, charts and page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mesa_train.utils import records
from mesa_train.utils.formatting import describe

from . import charts
from .html import write_report


class Results:
    """The folder of one comparison.

    Args:
        folder: the folder.
        setting: model, inputs, dtype and device of the comparison, as the commands print them in
            JSON.
        device: device of the measurement.
        command: the command line.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any], device: str, command: str) -> None:
        charts.check()  # Fail now, not after all measurements.
        self.folder = folder
        source = records.provenance(device)
        self.setting = {
            **setting,
            "shapes": setting["inputs"],
            "command": command,
            "device_name": source["device"],
            "versions": {**source["versions"], **_versions(setting["model"])},
            **{key: source[key] for key in ("threads", "commit", "date")},
        }
        self._write([])

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, so that no later failure loses it."""
        records.append(self.folder / "rows.jsonl", {**self.setting, **row})

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows in their order, the charts and the page."""
        self._write(rows)
        title = describe(self.setting)
        for name, chart in (
            ("compare", charts.tradeoff(rows, title)),
            ("where", charts.where(rows, title)),
        ):
            path = self.folder / f"{name}.png"
            # A chart of an earlier comparison must not stay beside these rows.
            path.unlink(missing_ok=True)
            if chart is not None:
                charts.save_png(chart, path)
        write_report(self.folder / "report.html", rows, self.setting)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file of rows."""
        path = self.folder / "rows.jsonl"
        path.unlink(missing_ok=True)
        records.append(path, *({**self.setting, **row} for row in rows))


def _versions(model: str) -> dict[str, str]:
    """Versions of the other packages that the rows depend on."""
    packages = {"hf": "transformers", "torchvision": "torchvision"}
    names = ["bitsandbytes", *filter(None, [packages.get(model.partition(":")[0])])]
    versions = {}
    for package in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
