"""Runs of the quickstarts of the recipes that are not classifiers: whole, killed, resumed.

Each quickstart runs to its end. Then a copy of the run, without its last checkpoint, continues, is
killed by SIGKILL in the middle of its last part, and is resumed. Both runs must end with the same
scores and the same weights. Quickstarts with other settings than the file's are comparisons, and are
not killed. A row for each goes to docs/results/recipe_quickstarts.jsonl. The last part is what follows
the checkpoint before the last: an epoch, or the steps between two checkpoints.

LiT reads the encoder of MoCo v3, and the student reads its teacher, so the quickstarts run in the
order of `QUICKSTARTS`.

    python scripts/bench/recipe_quickstarts.py
    python scripts/bench/recipe_quickstarts.py --only "lit;video" --prefix "nice -n 10"
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import quickstarts as common
import typer
import yaml

from mesa_train.utils import records

RESULTS = common.ROOT / "docs/results/recipe_quickstarts.jsonl"
# Columns of an epoch that a resumed run need not repeat.
TIMED = ("step_ms", "images_per_s", "seconds", "wait_ms", "peak_bytes", "minutes")


@dataclass(frozen=True)
class Quickstart:
    """A quickstart and its score.

    Attributes:
        recipe: folder under recipes.
        file: the configuration.
        score: column of the evaluations' rows.
        changes: `section.key=value`, which differ from the file.
        chance: the score of a guess, for scores without a baseline in the rows.
        baseline: column with the score of an answer that looks at no image.
        kind: of the rows of evaluations in the metrics; default "epoch".
        place: column with an evaluation's place in the run; default "epoch".
        only: columns and values that an evaluation must have to be the score's; default: none.
    """

    recipe: str
    file: str
    score: str
    changes: tuple[str, ...] = ()
    chance: float | None = None
    baseline: str | None = None
    kind: str = "epoch"
    place: str = "epoch"
    only: tuple[tuple[str, str], ...] = ()

    def evaluations(self, folder: Path) -> list[records.Row]:
        """The rows of all evaluations of a run."""
        return common.of_kind(folder, self.kind)

    def curve(self, folder: Path) -> list[records.Row]:
        """The rows of evaluations with the score."""
        return [
            row
            for row in self.evaluations(folder)
            if row.get(self.score) is not None and all(row[k] == v for k, v in self.only)
        ]

    @property
    def config(self) -> Path:
        """The file."""
        return common.ROOT / "recipes" / self.recipe / self.file

    def command(self, out: str, *more: str) -> list[str]:
        """The training command."""
        sets = [x for change in (*self.changes, f"train.out={out}") for x in ("--set", change)]
        script = common.ROOT / "recipes" / self.recipe / "train.py"
        return [sys.executable, str(script), "--config", str(self.config), *sets, *more]


QUICKSTARTS = {
    "mocov3": Quickstart("mocov3", "quickstart.yaml", "knn", chance=0.1),
    "mocov3 plain": Quickstart(
        "mocov3", "quickstart.yaml", "knn", ("train.policy=plain",), chance=0.1
    ),
    "mocov3, linear": Quickstart("mocov3", "quickstart_linear.yaml", "top1", chance=0.1),
    "lit": Quickstart("lit", "quickstart.yaml", "top1", chance=0.1),
    "lit unlocked": Quickstart("lit", "quickstart_unlocked.yaml", "top1", chance=0.1),
    "segmentation": Quickstart(
        "decoders", "quickstart_segmentation.yaml", "mean_iou", baseline="mean_iou_of_commonest"
    ),
    "depth": Quickstart(
        "decoders", "quickstart_depth.yaml", "abs_rel", baseline="abs_rel_of_median"
    ),
    "video": Quickstart("video", "quickstart.yaml", "top1", chance=1 / 8),
    "video, mean of frames": Quickstart(
        "video", "quickstart.yaml", "top1", ("probe.layers=0",), chance=1 / 8
    ),
    "teacher": Quickstart("litv2", "quickstart.yaml", "top1", chance=0.1),
    "distill": Quickstart("distill", "quickstart.yaml", "top1", chance=0.1),
    "distill, labels": Quickstart("distill", "quickstart_labels.yaml", "top1", chance=0.1),
    "detection": Quickstart("dense", "quickstart_detection.yaml", "ap", chance=0.0),
    "semantic fpn": Quickstart("dense", "quickstart_segmentation.yaml", "miou", chance=0.0),
    "open world": Quickstart(
        "open_world",
        "quickstart.yaml",
        "map_known",
        chance=0.0,
        kind="evaluation",
        place="stage",
        only=(("energy", "off"), ("repetitions", "drop")),
    ),
}


def main(
    only: Annotated[str, typer.Option(help="Names with semicolons between; default: all.")] = "",
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/quickstarts"),
    prefix: Annotated[str, typer.Option(help="Put before each training command.")] = "",
    kill: Annotated[bool, typer.Option(help="Kill and resume a copy of each run.")] = True,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Run the quickstarts and append a row for each."""
    names = [name.strip() for name in only.split(";")] if only else list(QUICKSTARTS)
    if unknown := [name for name in names if name not in QUICKSTARTS]:
        raise SystemExit(
            f"recipe_quickstarts: --only: no quickstart {unknown[0]}; choose from "
            f"{'; '.join(QUICKSTARTS)}"
        )
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        row = {"name": name, **measured(QUICKSTARTS[name], name, work, shlex.split(prefix), kill)}
        records.append(out, {**row, **records.provenance()})
        print(f"{name}: {row['score']} {row['value']:.4g}", flush=True)
        if "same" in row:
            print(f"  the same after SIGKILL and a resume: {row['same']}", flush=True)


def measured(
    quickstart: Quickstart, name: str, work: Path, prefix: list[str], kill: bool = True
) -> records.Row:
    """Run a quickstart, then its last part killed and resumed. Returns the row without its origin."""
    out = folder_of(quickstart, name)
    whole = work / out
    seconds = None
    if not (whole / "curves.png").exists():
        before = common.processor_seconds()
        common.run([*prefix, *quickstart.command(out)], work)
        seconds = round(common.processor_seconds() - before, 1)
    curve = quickstart.curve(whole)
    last = curve[-1]
    # A run with other settings than the file's is a comparison, and is not killed.
    kill = kill and not quickstart.changes
    killed = killed_and_resumed(quickstart, out, work, prefix) if kill else {}
    return {
        "recipe": quickstart.recipe,
        "file": quickstart.file,
        "changes": list(quickstart.changes),
        "policy": last["name"],
        "seed": last["seed"],
        "epochs": last[quickstart.place],
        "steps": last["step"],
        "score": quickstart.score,
        "value": last[quickstart.score],
        "curve": [[row[quickstart.place], row[quickstart.score]] for row in curve],
        "scores": {k: v for k, v in last.items() if isinstance(v, float) and k not in TIMED},
        "chance": quickstart.chance,
        "baseline": last[quickstart.baseline] if quickstart.baseline else None,
        "processor_s": seconds,
        **killed,
    }  # fmt: skip


def killed_and_resumed(
    quickstart: Quickstart, out: str, work: Path, prefix: list[str]
) -> records.Row:
    """Repeat the last part of a run in a copy, killed and resumed. Returns columns of its row."""
    whole, parted = work / out, work / f"{out}_killed"
    shutil.rmtree(parted, ignore_errors=True)
    shutil.copytree(whole, parted, symlinks=True)
    *_, before, last = common.checkpoints(parted)
    shutil.rmtree(last)
    start, end = (int(folder.name.removeprefix("step-")) for folder in (before, last))
    again = [*prefix, *quickstart.command(f"{out}_killed", "--resume", "auto")]
    # Fast steps end before a row of every tenth step is seen.
    watched = [*again, "--set", "train.log_every=1"]
    killed_after = common.killed(watched, work, parted, start, (end - start) // 3)
    common.run(again, work)
    same = scores(quickstart.evaluations(whole)) == scores(quickstart.evaluations(parted))
    return {
        "killed_after": killed_after,
        "resumed_from": start,
        "same": same and common.same_weights(whole, parted),
    }


def folder_of(quickstart: Quickstart, name: str) -> str:
    """The run's folder: the file's own, or one of the name if settings differ from the file."""
    if quickstart.changes:
        return f"runs/{name.replace(',', '').replace(' ', '_')}"
    return str(yaml.safe_load(quickstart.config.read_text())["train"]["out"])


def scores(epochs: list[records.Row]) -> list[records.Row]:
    """The rows of evaluations without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in epochs]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
