"""Make the picture lists of the open-world benchmark from VOC's and COCO's annotations.

    python recipes/open_world/make_splits.py --voc2007 VOC2007 --voc2012 VOC2012 --coco COCO --out lists

Prints the length of each list beside the official one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import coco as coco_format
from mesa_train.training.dense import voc as voc_format
from mesa_train.training.mistakes import in_one_line
from mesa_train.training.open_world import splits
from mesa_train.training.open_world.tasks import BENCHMARKS


def main(
    coco: Annotated[Path, typer.Option(help="Folder of annotations, train2017 and val2017.")],
    out: Annotated[Path, typer.Option(help="Folder of the lists.")],
    voc2007: Annotated[Path | None, typer.Option(help="VOC2007; owod needs it.")] = None,
    voc2012: Annotated[Path | None, typer.Option(help="VOC2012; owod needs it.")] = None,
    tasks: Annotated[str, typer.Option(help="owod or sowodb.")] = "owod",
    per_class: Annotated[int, typer.Option(min=1, help="Objects of a class in a replay.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the replay lists.")] = 0,
    crowd: Annotated[bool, typer.Option("--crowd", help="Crowd regions are objects.")] = False,
) -> None:
    """Make the lists; see recipes/open_world/README.md."""
    with in_one_line("open_world"):
        if tasks not in BENCHMARKS:
            raise ConfigError(f"--tasks must be one of {', '.join(BENCHMARKS)}, got {tasks!r}")
        chosen = BENCHMARKS[tasks]
        train: dict[str, splits.Labels] = {}
        test: dict[str, splits.Labels] = {}
        if tasks == "owod":
            if voc2007 is None or voc2012 is None:
                raise ConfigError("--voc2007 and --voc2012 are needed with --tasks owod")
            train["voc"] = {}
            for name, root in (("voc2007", voc2007), ("voc2012", voc2012)):
                found = voc_format.load(root, "trainval")
                train["voc"] |= splits.labels_of(found, name, chosen)
            found = voc_format.load(voc2007, "test")
            test["voc"] = splits.labels_of(found, "voc2007", chosen)
        for group, split in ((train, "train2017"), (test, "val2017")):
            file = coco / "annotations" / f"instances_{split}.json"
            found = coco_format.load(file, coco / split)
            group["coco"] = splits.labels_of(found, f"coco_{split}", chosen, crowd=crowd)
        lists = splits.make(chosen, train, test, per_class=per_class, seed=seed)
        splits.write(lists, out, official=tasks == "owod")
        for name, counts in json.loads((out / "counts.json").read_text()).items():
            print(f"{name:<14}", *(f"{key} {value:,}" for key, value in counts.items()), sep="  ")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
