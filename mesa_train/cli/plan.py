"""`mesa-train plan`: the policy that fits a memory budget, and what it will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mesa_train.cli import common


def plan(
    model: common.Model,
    budget: Annotated[
        str | None,
        typer.Option(help="Most memory of a training step, such as 8GiB; default: least possible."),
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Most step time, as a multiple of plain's: 1.1.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Most gradient error that codes may add: 0.02 for 2 %.")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="Draw what every budget costs to this PNG file.")
    ] = None,
    rivals: Annotated[
        Path | None, typer.Option(help="rows.jsonl of a comparison, to draw beside the frontier.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the policy to this YAML file.")] = None,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.bf16,
    device: common.Device = None,
    fake: common.Fake = False,
    as_json: common.Json = False,
) -> None:
    """Choose for every stash: keep, 8, 4 or 2 bits, or rebuild; for every block: or checkpoint it."""
    with common.one_line_errors():
        from mesa_train.memory import terminal
        from mesa_train.memory.planner import Planner

        loaded, where = common.loading(model, batch_size, image_size, device, fake)
        with common.progress_bar() as progress:
            planner = Planner(
                loaded.model, loaded.inputs, autocast=common.autocast_of(dtype), progress=progress
            )
            found = planner.plan(budget, max_time=max_time, max_error=max_error)
            plans = planner.frontier() if frontier is not None else []
        if out is not None:
            found.policy.to_yaml(out)
        if frontier is not None:
            from mesa_train.memory.charts import save_png
            from mesa_train.memory.frontier import draw
            from mesa_train.training import records

            points = records.read(rivals) if rivals is not None else []
            save_png(draw(plans, points, common.title_of(loaded, dtype, where)), frontier)
        if as_json:
            common.show_json(
                {
                    **common.setting_of(loaded, dtype, where, fake),
                    "budget": budget,
                    "policy": found.policy.to_yaml(),
                    "prediction": found.prediction.to_dict(),
                    "plain": found.plain.to_dict(),
                    "gap": found.gap,
                    "frontier": [p.prediction.to_dict() for p in plans],
                }
            )
            return
        common.show(
            common.title_of(loaded, dtype, where),
            terminal.prediction(found),
            terminal.choices(found),
        )
        if out is None:
            typer.echo(found.policy.to_yaml(), nl=False)
        else:
            common.show(f"the policy is in {out}")
