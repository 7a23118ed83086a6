"""`mesa-train plan`: find the policy that fits a memory budget, and predict its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from mesa_train.loading.model import Loaded
    from mesa_train.measure import Profile
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
    save_profile: Annotated[
        Path | None, typer.Option(help="Write the measured profile to this JSON file.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Read a file of --save-profile instead of measuring.")
    ] = None,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.auto,
    device: common.Device = None,
    fake: common.Fake = False,
    as_json: common.Json = False,
) -> None:
    """Find a policy that fits a memory budget.

    Chooses for each stash: uncompressed, 8 to 2 bits, rebuilt, or, on a GPU, offloaded to CPU
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
        common.writable_file(save_profile, "--save-profile", ".json")
        if profile is not None and save_profile is not None:
            raise ValueError("--save-profile writes a new measurement; leave --profile out")
        saved = None if profile is None else _load_profile(profile)
        loaded, target = common.loading(
            model, batch_size, image_size, device, fake or saved is not None
        )
        _check_baselines(baselines, points, loaded)
        if saved is not None:
            setting = _setting_of_profile(profile, saved, loaded, dtype)
            planner = Planner(saved, cpu_memory=cpu_memory)
        else:
            dtype = common.resolved(loaded, dtype, target, fake)
            common.check_precision(loaded, dtype, target, fake)
            setting = common.setting_of(loaded, dtype, target, fake)
        with common.progress_bar() as progress:
            if saved is None:
                planner = Planner.of(
                    loaded.model,
                    loaded.inputs,
                    autocast=common.autocast_of(dtype),
                    cpu_memory=cpu_memory,
                    progress=progress,
                )
                if save_profile is not None:
                    _save_profile(save_profile, planner.profile, setting)
            best = planner.plan(budget, max_time=max_time, max_error=max_error)
            plans = planner.frontier() if frontier is not None else []
        if out is not None:
            best.policy.to_yaml(out)
        title = common.title_of(loaded, common.DType(setting["dtype"]), setting["device"])
        if frontier is not None:
            _draw(plans, points, title, frontier)
        if as_json:
            common.show_json({**setting, "budget": budget, **_answer(best, plans)})
            return
        common.show(title, terminal.prediction(best), terminal.choices(best))
        if out is None:
            typer.echo(best.policy.to_yaml(), nl=False)
        else:
            common.show(f"The policy is in {out}.")


def _save_profile(path: Path, profile: Profile, setting: dict[str, Any]) -> None:
    """Write a profile with the model, inputs, dtype and device that it was measured with."""
    dataclasses.replace(profile, source={**profile.source, "setting": setting}).save(path)


def _load_profile(path: Path) -> Profile:
    """Read a profile; ValueError if there is no such file, or if the file is not a profile."""
    from mesa_train.measure import Profile

    if not path.is_file():
        raise ValueError(
            f"--profile {path}: no such file; `mesa-train plan --save-profile` writes it"
        )
    try:
        return Profile.load(path)
    except ValueError as error:
        raise ValueError(f"--profile {error}") from None


def _setting_of_profile(
    path: Path | None, profile: Profile, loaded: Loaded, dtype: common.DType
) -> dict[str, Any]:
    """Model, inputs, dtype and device of a profile.

    Raises:
        ValueError: the profile was measured with another model, batch or dtype.
    """
    from mesa_train.utils.formatting import format_shapes

    setting = profile.source.get("setting")
    if setting is None:
        raise ValueError(f"--profile {path}: the file does not name its model; measure it again")
    if (setting["model"], setting["inputs"]) != (loaded.name, loaded.shapes()):
        measured, given = format_shapes(setting["inputs"]), format_shapes(loaded.shapes())
        raise ValueError(
            f"--profile {path}: the profile is of {setting['model']} with {measured}, "
            f"not of {loaded.name} with {given}"
        )
    if dtype not in (common.DType.auto, common.DType(setting["dtype"])):
        raise ValueError(
            f"--profile {path}: the profile was measured with --dtype {setting['dtype']}, "
            f"not with {dtype.value}"
        )
    return dict(setting)


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
