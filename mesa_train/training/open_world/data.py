"""The pictures of each task of an open-world run: targets by task, replay sets, and test objects.

In the training of a task, only its own classes are annotated; older classes, later ones and unknown
objects are unlabelled. Fine-tuning has all classes known so far. In a test, every object that is not
known is unknown. Difficult objects are trained on, as by ORE; a test does not count them. Crowd
regions are neither, unless `data.crowd` is true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesa_train.models.open_world.exemplars import select_exemplars
from mesa_train.training import disk
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import coco, composed, voc
from mesa_train.training.dense.annotations import DetectionSet, Objects, Picture

from . import splits
from .config import Config, DataConfig, Stage
from .tasks import Tasks, tasks_of


@dataclasses.dataclass(frozen=True)
class OpenWorldData:
    """All pictures of a run, with labels in the order of the tasks.

    Attributes:
        tasks: classes by task. The label of other classes is the number of classes.
        training: pictures of a task's training by task, from 1.
        replay: paths of a fine-tuning's pictures by task; a task without: chosen from the training
            pictures of all tasks so far.
        test: test pictures, perhaps repeated.
        difficult: true if the ignored objects of a picture are VOC's difficult ones.
        exemplars: objects of each class in a replay set.
        seed: of the choice.
    """

    tasks: Tasks
    training: dict[int, list[Picture]]
    replay: dict[int, list[str]]
    test: list[Picture]
    difficult: Callable[[Picture], bool]
    exemplars: int
    seed: int

    def stage(self, stage: Stage) -> DetectionSet:
        """The pictures and targets of a stage.

        Raises:
            ConfigError: no picture has a target.
        """
        task = stage.task
        if not stage.finetune:
            labels = self.tasks.of(task)
            return self._set(stage.name, [(p, labels) for p in self.training[task]])
        known = range(self.tasks.seen(task))
        pictures = {p.path: p for t in range(1, task + 1) for p in self.training[t]}
        chosen = self.replay.get(task)
        if chosen is None:
            labels_of = {
                path: picture.objects.labels[self._trained(picture, known)].tolist()
                for path, picture in pictures.items()
            }
            chosen = select_exemplars(labels_of, known, self.exemplars, seed=self.seed)
        return self._set(stage.name, [(pictures[path], known) for path in chosen])

    def targets(self) -> list[dict[str, Tensor]]:
        """Objects of the test pictures with all labels: boxes, labels, difficult."""
        return [
            {
                "boxes": torch.from_numpy(picture.objects.boxes),
                "labels": torch.from_numpy(picture.objects.labels),
                "difficult": torch.from_numpy(picture.objects.ignored),
            }
            for picture in self.test
        ]

    def _trained(self, picture: Picture, labels: Iterable[int]) -> Any:
        """True for the targets of a picture among labels."""
        objects = picture.objects
        large = objects.trained
        if self.difficult(picture):
            sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
            large = large | (objects.ignored & (sides >= 1).all(1))
        return large & np.isin(objects.labels, list(labels))

    def _set(self, name: str, chosen: list[tuple[Picture, Iterable[int]]]) -> DetectionSet:
        pictures = []
        for picture, labels in chosen:
            trained = self._trained(picture, labels)
            if trained.any():
                objects = dataclasses.replace(picture.objects, trained=trained)
                pictures.append(dataclasses.replace(picture, objects=objects))
        if not pictures:
            raise ConfigError(f"data: stage {name} has no picture with a target")
        names = self.tasks.names
        return DetectionSet(name, pictures, names, tuple(range(1, len(names) + 1)))


def load(config: Config) -> OpenWorldData:
    """Read the data of a configuration.

    Raises:
        ConfigError: in one line, the file, the field and its value.
    """
    data = config.data
    return _benchmark(config) if data.format == "benchmark" else _folder(config)


def _folder(config: Config) -> OpenWorldData:
    """A data set in COCO's or VOC's format, or composed digits."""
    data = config.data
    folder = Path(str(data.path))
    if data.format == "digits":
        _compose(data, folder)
    if data.format == "voc":
        train = voc.load(folder, data.train)
        test = voc.load(folder, data.val, classes=train.names)
    else:
        train, test = (
            coco.load(folder / f"annotations/instances_{split}.json", folder / split)
            for split in (data.train, data.val)
        )
        if train.names != test.names:
            raise ConfigError(f"{test.file}: categories differ from {train.file}")
    tasks = tasks_of(data.tasks, train.names)
    pictures = relabelled(train, tasks, crowd=data.crowd)
    training = {
        task: [p for p in pictures if np.isin(p.objects.labels, list(tasks.of(task))).any()]
        for task in range(1, len(tasks.classes) + 1)
    }
    for task, found in training.items():
        if not found:
            names = ", ".join(tasks.classes[task - 1])
            raise ConfigError(f"{train.file}: no picture has a class of task {task} ({names})")
    return OpenWorldData(
        tasks,
        training,
        {},
        relabelled(test, tasks, crowd=data.crowd),
        lambda picture: data.format == "voc",  # noqa: ARG005
        config.method.exemplars,
        config.train.seed,
    )


def _compose(data: DataConfig, folder: Path) -> None:
    """Write the composed digits if the folder does not hold them."""
    about = f"{data.train_pictures} {data.val_pictures} {data.side}\n"
    mark = folder / "open_world.txt"
    if mark.is_file():
        if mark.read_text() != about:
            raise ConfigError(
                f"data.path={folder} holds other pictures ({mark.read_text().strip()}); choose "
                "another folder"
            )
        return
    if folder.exists():
        raise ConfigError(f"data.path={folder} is no folder of composed digits; choose a new one")
    # A process that is killed leaves a folder that is not used.
    written = folder.with_name(f".{folder.name}.partial")
    disk.remove(written)
    counts = {data.train: data.train_pictures, data.val: data.val_pictures}
    sides = (max(12, data.side // 5), max(14, data.side * 9 // 20))
    composed.write_coco(written, counts, size=(data.side, data.side), objects=(1, 4), sides=sides)
    (written / mark.name).write_text(about)
    written.rename(folder)


def relabelled(data: DetectionSet, tasks: Tasks, *, crowd: bool = False) -> list[Picture]:
    """Pictures with labels by the tasks' order; with `crowd`, crowd regions become objects."""
    new = np.array([tasks.label(name) for name in data.names], np.int64)

    def change(objects: Objects) -> Objects:
        changes: dict[str, Any] = {"labels": new[objects.labels]}
        if crowd:
            changes |= {
                "ignored": np.zeros_like(objects.ignored),
                "trained": objects.trained | (objects.ignored & (objects.areas > 0)),
            }
        return dataclasses.replace(objects, **changes)

    return [dataclasses.replace(p, objects=change(p.objects)) for p in data.pictures]


def _benchmark(config: Config) -> OpenWorldData:
    """VOC and COCO with the benchmark's lists."""
    data = config.data
    tasks = tasks_of(data.tasks, ())
    every = {}
    for prefix, pictures in _sources(data, tasks):
        every.update({f"{prefix}/{Path(p.path).stem}": p for p in pictures})

    def listed(name: str) -> list[str]:
        ids = splits.read(str(data.lists), name)
        missing = [line for line in ids if line not in every]
        if missing:
            raise ConfigError(
                f"data.lists: {len(missing)} pictures of {name} are not in the data, {missing[0]} "
                "for example"
            )
        return ids

    count = len(tasks.classes)
    training = {t: [every[i] for i in listed(f"t{t}_train")] for t in range(1, count + 1)}
    replay = {t: [every[i].path for i in listed(f"t{t}_ft")] for t in range(2, count + 1)}
    paths = {id(p) for name, p in every.items() if name.startswith("voc")}
    return OpenWorldData(
        tasks,
        training,
        replay,
        [every[i] for i in listed(data.test)],
        lambda picture: id(picture) in paths,
        config.method.exemplars,
        config.train.seed,
    )


def _sources(data: DataConfig, tasks: Tasks) -> list[tuple[str, list[Picture]]]:
    """Pictures of VOC and COCO by the prefix of their ids."""
    found = []
    if data.tasks == "owod":
        for prefix, root, split in (
            ("voc2007", data.voc2007, "trainval"),
            ("voc2007", data.voc2007, "test"),
            ("voc2012", data.voc2012, "trainval"),
        ):
            found.append((prefix, relabelled(voc.load(str(root), split), tasks)))
    for split in ("train2017", "val2017"):
        folder = Path(str(data.coco))
        read = coco.load(folder / f"annotations/instances_{split}.json", folder / split)
        found.append((f"coco_{split}", relabelled(read, tasks, crowd=data.crowd)))
    return found
