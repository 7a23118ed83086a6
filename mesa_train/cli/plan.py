"""`mesa-train plan`: find the policy that fits a memory budget, and predict its cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from mesa_train.loading.model import Loaded
    from mesa_train.planner.plan import Plan


def plan(
    model: common.Model,
    budget: Annotated[
        str | None,
        typer.Option(help="Most memory of a step, such as 8GiB; default: the smallest possible."),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(help="Most step time, as a multiple of plain's time, such as 1.1."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Most gradient error that codes may add, such as 0.02 for 2 %."),
    ] = None,
    cpu_memory: Annotated[
        str | None, typer.Option(help="Most CPU memory for offloaded stashes, such as 64GiB.")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="Draw the time and error of every budget to this PNG file.")
    ] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(
            "--baselines",
            "--rivals",
            help="rows.jsonl of `mesa-train compare`, to draw beside the frontier.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the policy to this YAML file.")] = None,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.auto,
    device: common.Device = None,
    fake: common.Fake = False,
    as_json: common.Json = False,
) -> None:
    """Find a policy that fits a memory budget.

    Chooses for each stash: uncompressed, 8, 4 or 2 bits, rebuilt, or, on a GPU, offloaded to CPU
    memory. Chooses for each block whether to checkpoint it. Predicts the memory, time and gradient
    error of a step.
    """
    with common.one_line_errors():
        from mesa_train.planner.planner import Planner
        from mesa_train.report import terminal
        from mesa_train.utils.formatting import parse_bytes

        if budget is not None:
            parse_bytes(budget, "--budget")
        points = _baselines(baselines, frontier)
        common.writable_file(out, "--out", ".yaml .yml")
        common.writable_file(frontier, "--frontier", ".png")
        loaded, target = common.loading(model, batch_size, image_size, device, fake)
        dtype = common.resolved(loaded, dtype, target, fake)
        common.check_precision(loaded, dtype, target, fake)
        _check_baselines(baselines, points, loaded)
        with common.progress_bar() as progress:
            planner = Planner.of(
                loaded.model,
                loaded.inputs,
                autocast=common.autocast_of(dtype),
                cpu_memory=cpu_memory,
                progress=progress,
            )
            best = planner.plan(budget, max_time=max_time, max_error=max_error)
            plans = planner.frontier() if frontier is not None else []
        if out is not None:
            best.policy.to_yaml(out)
        title = common.title_of(loaded, dtype, target)
        if frontier is not None:
            _draw(plans, points, title, frontier)
        if as_json:
            setting = common.setting_of(loaded, dtype, target, fake)
            common.show_json({**setting, "budget": budget, **_answer(best, plans)})
            return
        common.show(title, terminal.prediction(best), terminal.choices(best))
        if out is None:
            typer.echo(best.policy.to_yaml(), nl=False)
        else:
            common.show(f"The policy is in {out}.")


def _draw(plans: Sequence[Plan], points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the chart of the frontier, with the rows of a comparison beside it."""
    from mesa_train.report.charts import save_png
    from mesa_train.report.frontier import draw

    save_png(draw(plans, points, title), path)


def _answer(plan: Plan, frontier: Sequence[Plan]) -> dict[str, Any]:
    """The JSON values of a plan and of the plans of the frontier."""
    return {
        "policy": plan.policy.to_yaml(),
        "prediction": plan.prediction.to_dict(),
        "plain": plan.plain.to_dict(),
        "gap": plan.gap,
        "frontier": [point.prediction.to_dict() for point in frontier],
    }


def _check_baselines(path: Path | None, rows: list[dict[str, Any]], loaded: Loaded) -> None:
    """ValueError if the rows are measured with another model or batch."""
    for row in rows:
        measured = row.get("model"), row.get("shapes", row.get("inputs"))
        if measured != (loaded.name, loaded.shapes()):
            from mesa_train.utils.formatting import format_shapes

            row_shapes, model_shapes = (
                format_shapes(measured[1] or []),
                format_shapes(loaded.shapes()),
            )
            raise ValueError(
                f"--baselines {path}: the rows are of {measured[0]} with {row_shapes}, "
                f"not of {loaded.name} with {model_shapes}"
            )


def _baselines(path: Path | None, frontier: Path | None) -> list[dict[str, Any]]:
    """The rows of a comparison; ValueError if they cannot be drawn."""
    from mesa_train.utils import records

    if path is None:
        return []
    if frontier is None:
        raise ValueError("--baselines needs --frontier chart.png, the chart to draw them in")
    if path.is_dir():
        path = path / "rows.jsonl"
    if not path.is_file():
        raise ValueError(f"--baselines {path}: no such file; `mesa-train compare --out` writes it")
    rows = records.read(path)
    if not any("method" in row for row in rows):
        raise ValueError(f"--baselines {path}: the file has no rows of `mesa-train compare`")
    return rows
