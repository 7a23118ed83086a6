"""`mesa-train compare`: methods side by side, each in a process of its own, and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
            "compile, PRESET+checkpoint, METHOD+adamw8bit, a policy's YAML file; default: all."
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
    """Methods side by side: bytes kept, peak, gradient error, step time, largest batch."""
    with common.one_line_errors():
        from mesa_train.memory.text import parse_bytes

        names = _methods(methods, quick)
        memory_bytes = None if memory is None else parse_bytes(memory)
        where = common.device_name(device, quick)
        # Also where every method runs elsewhere: what is wrong with the model shows here, at once. On
        # the CPU, so that nothing of this process lies on the GPU that is measured.
        loaded, _ = common.loading(model, batch_size, image_size, "cpu", fake=quick)
        setting = common.setting_of(loaded, dtype, where, quick)
        title = common.title_of(loaded, dtype, where)
        if not quick:
            del loaded
        asked = common.autocast_of(dtype)
        with common.progress_bar() as progress:
            if quick:
                rows = _counted(
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
                rows = list(measure(request, names, progress))
        if out is not None:
            _write(out, rows, setting, where)
        if as_json:
            common.show_json({**setting, "rows": rows})
            return
        from mesa_train.memory import terminal

        common.show(
            title, terminal.comparison(rows, common.console_width()), *terminal.notes_of(rows)
        )
        if out is not None:
            common.show(f"rows.jsonl, charts and report.html are in {out}")


def _methods(asked: str | None, quick: bool) -> list[str]:
    """The methods of a comma-separated list, or all that can be measured; ValueError for a name
    that is none."""
    from mesa_train.memory.contenders import DEFAULT, Contender

    names = list(DEFAULT)
    if asked is not None:
        names = [name.strip() for name in asked.split(",") if name.strip()]
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
) -> list[dict[str, Any]]:
    """Rows of bytes alone."""
    from mesa_train.memory.quick import count

    def make() -> Any:
        return common.loading(model, batch_size, image_size, device, fake=True)[0]

    with common.quiet():
        return count(
            make,
            names,
            batch_size=batch_size,
            dtype=autocast,
            memory_bytes=memory_bytes,
            progress=progress,
        )


def _write(
    folder: Path, rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], device: str
) -> None:
    """Rows, charts and the page."""
    from mesa_train.memory import charts
    from mesa_train.memory.report import write_report
    from mesa_train.training import records

    source = records.provenance(device)
    told = {
        **setting,
        "shapes": setting["inputs"],
        "command": common.command_line(),
        "device_name": source["device"],
        **{key: source[key] for key in ("threads", "versions", "commit", "date")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.unlink(missing_ok=True)
    records.append(path, *({**told, **row} for row in rows))
    title = f"{setting['model']}, {setting['dtype']}"
    tradeoff = charts.tradeoff(rows, title)
    if tradeoff is not None:
        charts.save_png(tradeoff, folder / "compare.png")
    where = charts.where(rows, title)
    if where is not None:
        charts.save_png(where, folder / "where.png")
    write_report(folder / "report.html", rows, told)
