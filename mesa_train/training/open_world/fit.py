"""A run of open-world detection from its configuration to its table and pictures.

A run's folder holds `metrics.jsonl` (step and evaluation rows), `curves.png`, a sheet of pictures
for each stage, `model.safetensors` and checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesa_train.report import figures
from mesa_train.training import accelerated_run, checkpoints, disk
from mesa_train.training.accelerated_run import CHECKPOINTS, step_report
from mesa_train.training.config_schema import ConfigError, changed
from mesa_train.training.dense import dry_run
from mesa_train.training.loop import train_epoch
from mesa_train.utils import records

from . import data, pictures
from .config import Config, Stage, of_dict, stages_of
from .run import OpenWorldRun
from .tasks import classes_of

METRICS = "metrics.jsonl"
_COLUMNS = ("map_previous", "map_current", "map_known", "unknown_recall", "wi", "aose")


def prepare(config: Config) -> OpenWorldRun:
    """Check a configuration and build a run.

    Raises:
        ConfigError: parts of the configuration do not fit together, or do not fit this machine.
    """
    from accelerate import Accelerator

    config.check_files()
    stages_of(config.optim, len(classes_of(config.data.tasks)))
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    config = dry_run.shared(config, accelerator.num_processes)  # type: ignore[arg-type,assignment]
    with accelerator.main_process_first():
        found = data.load(config)
    return OpenWorldRun(config, found, accelerator)


def resume(run: OpenWorldRun, how: str) -> bool:
    """Continue a run.

    Args:
        run: from `prepare`.
        how: "auto" for the newest complete checkpoint, "" for a new run, or a checkpoint's path.
    Returns:
        True if the run continues.
    Raises:
        ConfigError: there is no such checkpoint, or a new run would overwrite another.
    """
    return accelerated_run.resume(run, how, METRICS)


def load_run(folder: Path, changes: Sequence[str] = ()) -> Config:
    """The configuration of a run's newest checkpoint, with changes applied.

    Args:
        folder: of the run.
        changes: `section.key=value`, any number.
    Raises:
        ConfigError: the folder holds no checkpoint, or a change is wrong.
    """
    found = checkpoints.newest(folder / CHECKPOINTS)
    if found is None:
        raise ConfigError(f"--run: {folder} holds no checkpoint")
    with disk.reading(found[0]):
        config = found[1]["config"]
    return of_dict(changed(config, [f"train.out={json.dumps(str(folder))}", *changes]))


def fit(run: OpenWorldRun) -> list[dict[str, Any]]:
    """Train all stages that are left, and evaluate after each.

    Returns:
        The evaluation rows of the run, those of earlier processes included; none on other processes
        than the first.
    """
    config, metrics = run.config, run.out / METRICS
    report = step_report(
        run, metrics, lambda _: {"stage": run.stage.name}, lambda: f"{run.stage.name}: "
    )
    for stage in run.stages:
        if run.done >= stage.last:
            continue
        run.enter(stage)
        train_epoch(run, report)
        detections = evaluate(run, stage)
        # A process killed before this line repeats the evaluation, rows included.
        run.save()
        if run.main and config.train.pictures:
            pictures.draw(run, detections, run.out / f"{stage.name}.png", config.train.pictures)
    run.export()
    if not run.main:
        return []
    rows = [row for row in records.read(metrics) if row["kind"] == "evaluation"]
    draw(rows, run.out / "curves.png", f"{config.model.backbone} on {config.data.format}")
    return rows


def evaluate(run: OpenWorldRun, stage: Stage) -> list[Any]:
    """Evaluate without and with energies, and append the rows. Returns the last detections."""
    modes = dict.fromkeys(("off", run.config.method.energy))
    paths = [picture.path for picture in run.data.test]
    # A list that repeats pictures is evaluated in both ways.
    ways = ("drop",) if len(set(paths)) == len(paths) else ("drop", "count")
    detections: list[Any] = []
    for mode in modes:
        fits = run.fit_energies() if mode != "off" else {}
        if mode != "off" and not fits:
            continue
        detections = run.detect()
        if not run.main:
            continue
        for repeated in ways:
            row = run.score(detections, repeated=repeated).row()
            eleven = run.score(detections, repeated=repeated, points="11").row()
            row |= {"map_known_11": eleven["map_known"]}
            named = {"name": run.config.train.policy, "seed": run.config.train.seed}
            about = {"stage": stage.name, "task": stage.task, "energy": mode, **named}
            about |= {"rules": run.config.method.rules, "repetitions": repeated}
            about |= {"samples": run.config.method.samples} if mode != "off" else {}
            line = {"kind": "evaluation", "step": run.done, **about, **row, "fits": fits}
            disk.append(run.out / METRICS, line)
            run.accelerator.print(shown(line), flush=True)
    return detections


def shown(row: dict[str, Any]) -> str:
    """An evaluation as one line, shares in per cent."""
    parts = []
    for name in _COLUMNS:
        value = row[name]
        if value is not None:
            parts.append(f"{name} {value}" if name == "aose" else f"{name} {value:.1%}")
    which = row["stage"] + (f", energy {row['energy']}" if row["energy"] != "off" else "")
    again = ", repeated pictures counted" if row["repetitions"] == "count" else ""
    return f"{which}{again}: {', '.join(parts)}"


def draw(rows: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Draw the mAP of earlier, new and all known classes, and the recall of unknown objects."""
    chosen = [r for r in rows if r["energy"] == "off" and r["repetitions"] == "drop"]
    if not chosen:
        return
    canvas, (known, unknown) = figures.figure(2, title)
    places = range(len(chosen))
    labels = {"map_previous": "earlier classes", "map_current": "new", "map_known": "all known"}
    for name, label in labels.items():
        points = [
            (i, 100 * r[name]) for i, r in zip(places, chosen, strict=True) if r[name] is not None
        ]
        if points:
            known.plot(*zip(*points, strict=True), marker="o", label=label)
    known.legend(frameon=False)
    recalls = [(i, 100 * r["unknown_recall"]) for i, r in zip(places, chosen, strict=True)
               if r["unknown_recall"] is not None]  # fmt: skip
    if recalls:
        unknown.plot(*zip(*recalls, strict=True), marker="o")
    for axis, label in ((known, "mAP at IoU 0.5 (%)"), (unknown, "recall of unknown objects (%)")):
        axis.set_xticks(list(places), [row["stage"] for row in chosen])
        axis.set_ylabel(label)
        axis.set_ylim(0, 100)
    figures.save(canvas, picture)
