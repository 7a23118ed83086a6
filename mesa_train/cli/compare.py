"""`mesa-train compare`: methods side by side, each in a process of its own, and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesa_train.cli import common

if TYPE_CHECKING:
    import torch


def compare(
    model: common.Model,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.bf16,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: plain, float32, bf16, checkpoint, save_on_cpu, any preset, "
            "compile, compile-budget-0.5, compile-budget-0.2, compile-fp8, compile:PRESET, "
            "PRESET+checkpoint, METHOD+adamw8bit, a policy's YAML file; default: all."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", "--fake", help="Bytes alone, on tensors without data, in seconds."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of every method.")] = 4,
    memory: Annotated[
        str | None, typer.Option(help="Find the largest batch that fits, such as 24GiB.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Most seconds for one method.")] = 180.0,
    total: Annotated[
        float, typer.Option(min=1, help="Most seconds for all; what is left then is not begun.")
    ] = 340.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows.jsonl, charts and report.html.")
    ] = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Methods side by side, and a report. Bytes kept, peak of the step, gradient error, step time,
    largest batch; each method in a process of its own. Ctrl-C keeps what is done so far."""
    with common.one_line_errors():
        from mesa_train.memory.text import parse_bytes

        names = _methods(methods, quick)
        memory_bytes = None if memory is None else parse_bytes(memory, "--memory")
        where = common.device_name(device, quick)
        if out is not None:
            # Here, and not when all is measured.
            common.writable_folder(out, "--out")
        # Also where every method runs elsewhere: what is wrong with the model shows here, at once. On
        # the CPU, so that nothing of this process lies on the GPU that is measured.
        loaded, _ = common.loading(model, batch_size, image_size, "cpu", fake=quick)
        common.check_precision(loaded, dtype, where, quick)
        setting = common.setting_of(loaded, dtype, where, quick)
        title = common.title_of(loaded, dtype, where)
        if not quick:
            del loaded
        asked = common.autocast_of(dtype)
        kept = _Kept(out, setting, where)
        rows: list[dict[str, Any]] = []
        with common.progress_bar() as progress, _stoppable() as stop:
            if quick:
                made = _counted(
                    model, image_size, device, names, batch_size, asked, memory_bytes, progress
                )
            else:
                from mesa_train.memory.processes import Request, measure

                request = Request(
                    model,
                    batch_size=batch_size,
                    image_size=image_size,
                    device=where,
                    dtype=None if asked is None else str(asked).removeprefix("torch."),
                    rounds=rounds,
                    memory_bytes=memory_bytes,
                    limit_s=limit,
                    total_s=total,
                )
                made = measure(request, names, progress)
            try:
                for row in made:
                    rows.append(row)
                    kept.add(row)
            except KeyboardInterrupt:
                stop.asked = True
        rows.sort(key=lambda row: names.index(row["method"]))
        if rows:
            kept.finish(rows)
        if as_json:
            common.show_json({**setting, "rows": rows})
        elif rows:
            _show(title, rows, out)
        if stop.asked:
            said = f"stopped with {len(rows)} of {len(names)} methods done"
            typer.echo(f"mesa-train: {said}", err=True)
            raise typer.Exit(130)


def _show(title: str, rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    from mesa_train.memory import terminal

    common.show(title, terminal.comparison(rows, common.console_width()), *terminal.notes_of(rows))
    if out is not None:
        common.show(f"rows.jsonl, charts and report.html are in {out}")


@dataclasses.dataclass
class _Stop:
    """Whether the user asked for an end."""

    asked: bool = False


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Within the context a SIGTERM ends a comparison as Ctrl-C does: with the rows so far."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield _Stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def _methods(asked: str | None, quick: bool) -> list[str]:
    """The methods of a comma-separated list, or all that can be measured; ValueError for a name
    that is none."""
    from mesa_train.memory.contenders import DEFAULT, Contender

    names = list(DEFAULT)
    if asked is not None:
        names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    elif quick:
        names = [name for name in names if Contender.of(name).countable]
    for name in names:
        Contender.of(name)
    return names


def _counted(
    model: str,
    image_size: int | None,
    device: str | None,
    names: Sequence[str],
    batch_size: int,
    autocast: torch.dtype | None,
    memory_bytes: int | None,
    progress: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Rows of bytes alone."""
    from mesa_train.memory.quick import count

    def make() -> Any:
        return common.loading(model, batch_size, image_size, device, fake=True, tell=False)[0]

    with common.quiet():
        yield from count(
            make,
            names,
            dtype=autocast,
            memory_bytes=memory_bytes,
            progress=progress,
        )


class _Kept:
    """Rows on disk as they come, and charts and the page of them."""

    def __init__(self, folder: Path | None, setting: Mapping[str, Any], device: str) -> None:
        from mesa_train.training import records

        self.folder = folder
        if folder is None:
            return
        source = records.provenance(device)
        versions = {**source["versions"], **_versions(setting["model"])}
        self.told = {
            **setting,
            "shapes": setting["inputs"],
            "command": common.command_line(),
            "device_name": source["device"],
            "versions": versions,
            **{key: source[key] for key in ("threads", "commit", "date")},
        }
        self._write([])

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, so that whatever happens next does not lose it."""
        from mesa_train.training import records

        if self.folder is not None:
            records.append(self.folder / "rows.jsonl", {**self.told, **row})

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows in their order, the charts and the page."""
        if self.folder is None:
            return
        from mesa_train.memory import charts
        from mesa_train.memory.report import write_report
        from mesa_train.memory.text import describe

        self._write(rows)
        title = describe(self.told)
        for name, chart in (
            ("compare", charts.tradeoff(rows, title)),
            ("where", charts.where(rows, title)),
        ):
            path = self.folder / f"{name}.png"
            # What another comparison left would be taken for this one's.
            path.unlink(missing_ok=True)
            if chart is not None:
                charts.save_png(chart, path)
        write_report(self.folder / "report.html", rows, self.told)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from mesa_train.training import records

        assert self.folder is not None
        path = self.folder / "rows.jsonl"
        path.unlink(missing_ok=True)
        records.append(path, *({**self.told, **row} for row in rows))


def _versions(model: str) -> dict[str, str]:
    """Of what else the rows depend on."""
    packages = {"hf": "transformers", "torchvision": "torchvision"}
    wanted = ["bitsandbytes", *filter(None, [packages.get(model.partition(":")[0])])]
    found = {}
    for package in wanted:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
