"""`mesa-train compare`: measure methods side by side, each in a process of its own, and report."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from mesa_train.compare.scheduler import Request
    from mesa_train.report.results import Results


def compare(
    model: common.Model,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.auto,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: plain, float32, bf16, checkpoint, checkpoint+offload, save_on_cpu, "
            "float8, approx-bp, any preset, PRESET+offload, compile, compile-budget-0.5, "
            "compile-budget-0.2, compile-fp8, compile:PRESET, PRESET+checkpoint, "
            "METHOD+adamw8bit, a policy's YAML file; default: all."
        ),
    ] = None,
    fake: Annotated[
        bool,
        typer.Option("--fake", "--quick", help="Only count bytes, on fake tensors, in seconds."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of each method.")] = 4,
    memory: Annotated[
        str | None,
        typer.Option(help="Find the largest batch that fits this memory, such as 24GiB."),
    ] = None,
    method_timeout: Annotated[
        float,
        typer.Option("--method-timeout", "--limit", min=1, help="Most seconds for one method."),
    ] = 240.0,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            "--total",
            min=1,
            help="Most seconds for all methods; then no method starts.",
        ),
    ] = 340.0,
    out: Annotated[
        Path | None, typer.Option(help="Write rows.jsonl, charts and report.html to this folder.")
    ] = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Compare methods side by side and write a report.

    Measures saved bytes, peak of the step, gradient error, step time and largest batch, each method
    in a process of its own. Ctrl-C keeps the finished rows.
    """
    with common.one_line_errors():
        from mesa_train.compare.scheduler import Request, measure
        from mesa_train.report.results import Results
        from mesa_train.utils.formatting import parse_bytes

        names = _methods(methods, fake)
        memory_bytes = None if memory is None else parse_bytes(memory, "--memory")
        target = common.device_name(device, fake)
        if out is not None:
            # Check now, not after all measurements.
            common.writable_folder(out, "--out")
        # Show an error of the model at once, and take no memory of the measured GPU.
        loaded, _ = common.loading(model, batch_size, image_size, "cpu", fake=fake)
        dtype = common.resolved(loaded, dtype, target, fake)
        common.check_precision(loaded, dtype, target, fake)
        setting = common.setting_of(loaded, dtype, target, fake)
        title = common.title_of(loaded, dtype, target)
        if not fake:
            del loaded
        autocast = common.autocast_of(dtype)
        request = Request(
            model,
            batch_size=batch_size,
            image_size=image_size,
            device=target,
            dtype=None if autocast is None else str(autocast).removeprefix("torch."),
            rounds=rounds,
            memory_bytes=memory_bytes,
            limit_s=method_timeout,
            total_s=timeout,
        )
        results = None if out is None else Results(out, setting, target, common.command_line())
        with common.progress_bar() as progress:
            counted = functools.partial(_counted, device=device)
            measured_rows = (counted if fake else measure)(request, names, progress)
            rows, stopped = _read(measured_rows, results)
        rows.sort(key=lambda row: names.index(row["method"]))
        if rows and results is not None:
            results.finish(rows)
        if as_json:
            common.show_json({**setting, "rows": rows})
        elif rows:
            _show(title, rows, out)
        _exit_if(stopped, len(rows), len(names))


def _exit_if(stopped: bool, done: int, count: int) -> None:
    """End with the status of an interrupt if the user stopped the comparison."""
    if stopped:
        typer.echo(f"mesa-train: stopped with {done} of {count} methods done", err=True)
        raise typer.Exit(130)


def _read(
    measured_rows: Generator[dict[str, Any], None, None], results: Results | None
) -> tuple[list[dict[str, Any]], bool]:
    """(the rows, each written to disk when it is measured; whether the user stopped)."""
    rows: list[dict[str, Any]] = []
    try:
        with _stoppable(), contextlib.closing(measured_rows):
            for row in measured_rows:
                rows.append(row)
                if results is not None:
                    results.add(row)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _show(title: str, rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Print the table of a comparison."""
    from mesa_train.report import terminal

    common.show(title, terminal.comparison(rows, common.console_width()), *terminal.notes_of(rows))
    if out is not None:
        common.show(f"rows.jsonl, charts and report.html are in {out}")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within the context, SIGTERM ends a comparison as Ctrl-C does, with the finished rows."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _methods(text: str | None, fake: bool) -> list[str]:
    """The methods of a comma-separated list; without one, all that can be measured.

    Raises:
        ValueError: a name is no method.
    """
    from mesa_train.methods.spec import DEFAULT, MethodSpec

    names = list(DEFAULT)
    if text is not None:
        names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    elif fake:
        names = [name for name in names if MethodSpec.of(name).countable]
    for name in names:
        MethodSpec.of(name)
    return names


def _counted(
    request: Request,
    names: Sequence[str],
    progress: Callable[[str, int, int], None],
    device: str | None,
) -> Generator[dict[str, Any], None, None]:
    """Rows of bytes alone, counted on fake tensors."""
    import torch

    from mesa_train.compare.counted import count

    def make() -> Any:
        batch, size = request.batch_size, request.image_size
        return common.loading(request.model, batch, size, device, fake=True, warn=False)[0]

    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    with common.quiet():
        memory = request.memory_bytes
        yield from count(make, names, dtype=dtype, memory_bytes=memory, progress=progress)
