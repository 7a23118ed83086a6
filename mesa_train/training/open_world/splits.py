"""The picture lists of the open-world benchmark, made from VOC's and COCO's annotations.

The folder of the lists has one text file a list and one picture id a line: `voc2007/000005` or
`coco_train2017/000000000009`. `counts.json` has the length of each list beside the official one.

| list | pictures |
|---|---|
| t1_train | of VOC 2007 and 2012, trainval (OWOD); of COCO's train2017 with a class of task 1 (SOWODB) |
| t2_train to t4_train | of COCO's train2017 with an object of that task's classes |
| t2_ft to t4_ft | replay: a balanced choice of the training pictures so far |
| test_official | VOC 2007 test, then COCO's val2017 by task: pictures repeat, as in the official list |
| test | the same without repetitions |
| all_task_val | a draw of the training pictures, 1,000 a task: for the fit of energies |
| t1_known_test | VOC 2007 test (OWOD); of COCO's val2017 with a class of task 1 (SOWODB) |
| t1_train_with_unk to t3_train_with_unk | t*_train, and a draw of later tasks' pictures |

The official code counts crowd regions as objects. Here they count with `crowd=True` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mesa_train.models.open_world.exemplars import select_exemplars
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense.annotations import DetectionSet

from .tasks import Tasks

# Lengths of the official lists: lines, and pictures.
OFFICIAL = {
    "t1_train": (16_551, 16_551),
    "t2_train": (45_520, 45_520),
    "t3_train": (39_402, 39_402),
    "t4_train": (40_260, 40_260),
    "t2_ft": (1_743, 1_743),
    "t3_ft": (2_361, 2_361),
    "t4_ft": (2_749, 2_749),
    "test_official": (10_246, 9_119),
    "test": (9_119, 9_119),
    "all_task_val": (4_000, 3_978),
    "t1_known_test": (4_952, 4_952),
    "t1_train_with_unk": (18_051, 18_049),
    "t2_train_with_unk": (47_520, 47_063),
    "t3_train_with_unk": (41_402, 40_901),
}
# Pictures of a task in all_task_val, and further pictures of t*_train_with_unk.
_VAL, _WITH_UNKNOWNS = 1_000, {1: 1_500, 2: 2_000, 3: 2_000}
Labels = dict[str, list[int]]


def labels_of(data: DetectionSet, prefix: str, tasks: Tasks, *, crowd: bool = False) -> Labels:
    """The labels of each picture's objects, by picture id.

    Args:
        data: a split.
        prefix: of the ids, "voc2007".
        tasks: decide the labels.
        crowd: crowd regions count; default false. Of VOC, difficult objects always count.
    """
    every = crowd or prefix.startswith("voc")
    new = [tasks.label(name) for name in data.names]
    found = {}
    for picture in data.pictures:
        objects = picture.objects
        chosen = objects.labels if every else objects.labels[~objects.ignored]
        found[f"{prefix}/{Path(picture.path).stem}"] = [new[label] for label in chosen]
    return found


def with_classes(labels: Mapping[str, Iterable[int]], classes: range) -> list[str]:
    """The pictures with an object of the classes."""
    return [name for name, found in labels.items() if any(label in classes for label in found)]


def make(
    tasks: Tasks,
    train: Mapping[str, Labels],
    test: Mapping[str, Labels],
    *,
    per_class: int = 50,
    seed: int = 0,
) -> dict[str, list[str]]:
    """The lists of the benchmark.

    Args:
        tasks: "owod" or "sowodb".
        train: labels of the training pictures; "voc" (VOC 2007 and 2012, without it task 1 comes
            from COCO too) and "coco".
        test: labels of the test pictures, "voc" and "coco".
        per_class: objects of each class in a replay list; default 50.
        seed: of the replay lists.
    Returns:
        Picture ids by list.
    """
    lists: dict[str, list[str]] = {}
    known: Labels = {}
    official = list(test.get("voc", {}))
    for task in range(1, len(tasks.classes) + 1):
        own, classes = tasks.of(task), range(tasks.seen(task))
        source = train["voc"] if task == 1 and "voc" in train else train["coco"]
        chosen = list(source) if source is train.get("voc") else with_classes(source, own)
        lists[f"t{task}_train"] = chosen
        known |= {name: source[name] for name in chosen}
        if task > 1:
            lists[f"t{task}_ft"] = select_exemplars(known, classes, per_class, seed=seed)
        if task > 1 or "voc" not in test:
            official += with_classes(test["coco"], own)
    lists["test_official"] = official
    lists["test"] = list(dict.fromkeys(official))
    first = test["voc"] if "voc" in test else with_classes(test["coco"], tasks.of(1))
    lists["t1_known_test"] = list(first)
    return lists | _drawn(lists, len(tasks.classes), seed)


def _drawn(lists: Mapping[str, list[str]], tasks: int, seed: int) -> dict[str, list[str]]:
    """Lists that the authors drew by a rule that is not documented, in the official lengths.

    A draw takes at most a quarter of a list, which small data sets need.
    """
    random = np.random.default_rng(seed)

    def draw(names: list[str], count: int) -> list[str]:
        chosen = random.permutation(len(names))[: min(count, max(1, len(names) // 4))]
        return [names[index] for index in sorted(chosen)]

    trained = {task: lists[f"t{task}_train"] for task in range(1, tasks + 1)}
    found = {"all_task_val": [name for own in trained.values() for name in draw(own, _VAL)]}
    for task in range(1, tasks):
        parts = [trained[later] for later in range(task + 1, tasks + 1)]
        share = _WITH_UNKNOWNS.get(task, _WITH_UNKNOWNS[3]) // len(parts)
        added = [name for part in parts for name in draw(part, share)]
        found[f"t{task}_train_with_unk"] = [*trained[task], *added]
    return found


def write(lists: Mapping[str, list[str]], folder: str | Path, *, official: bool = True) -> Path:
    """Write lists to a folder, and their lengths to `counts.json`.

    Args:
        lists: picture ids by list.
        folder: created if missing.
        official: add the official lengths; default true.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, ids in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in ids))
        counts[name] = {"lines": len(ids), "pictures": len(set(ids))}
        if official and name in OFFICIAL:
            counts[name] |= dict(
                zip(("official_lines", "official_pictures"), OFFICIAL[name], strict=True)
            )
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    return folder


def read(folder: str | Path, name: str) -> list[str]:
    """The picture ids of a list.

    Raises:
        ConfigError: the list is missing or empty.
    """
    file = Path(folder) / f"{name}.txt"
    if not file.is_file():
        raise ConfigError(f"data.lists: no list {file}; recipes/open_world/make_splits.py makes it")
    ids = file.read_text().split()
    if not ids:
        raise ConfigError(f"data.lists: {file} is empty")
    return ids
