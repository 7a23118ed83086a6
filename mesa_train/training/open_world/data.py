"""The pictures of each task of an open-world run: targets by task, replay sets, and test objects.

In the training of a task, only its own classes are annotated; older classes, later ones and unknown
objects are unlabelled. Fine-tuning has all classes known so far. In a test, every object that is not
known is unknown. Difficult objects are trained on, as by ORE; a test does not count them. Crowd
regions are neither, unless `data.crowd` is true.

The energies are fitted on pictures that no stage trains on and no test has. They have the objects
of all classes known so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
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
        fit: pictures for the fit of energies; none if `method.energy` is off.
        difficult: true if the ignored objects of a picture are VOC's difficult ones.
        exemplars: objects of each class in a replay set.
        seed: of the choice.
    """

    tasks: Tasks
    training: dict[int, list[Picture]]
    replay: dict[int, list[str]]
    test: list[Picture]
    fit: list[Picture]
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

    def fit_set(self, seen: int, *, unknowns: bool) -> DetectionSet:
        """The pictures of the fit with all objects of known classes.

        Args:
            seen: number of known classes.
            unknowns: objects of other classes are targets of the label "unknown".
        Raises:
            ValueError: no picture has a target.
        """
        unknown = len(self.tasks.names)
        chosen: list[tuple[Picture, Iterable[int]]] = []
        for picture in self.fit:
            labels = picture.objects.labels
            labels = np.where(labels < seen, labels, unknown)
            objects = dataclasses.replace(picture.objects, labels=labels)
            wanted = [*range(seen), unknown] if unknowns else range(seen)
            chosen.append((dataclasses.replace(picture, objects=objects), wanted))
        try:
            return self._set("fit", chosen)
        except ConfigError:
            raise ValueError(
                f"none of the {len(self.fit)} pictures of the fit has an object of the {seen} known "
                "classes"
            ) from None

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
    tested = relabelled(test, tasks, crowd=data.crowd)
    pool = _own_split(config, folder, train.names)
    own = None if pool is None else relabelled(pool, tasks, crowd=data.crowd)
    fit = fit_pictures(config, pictures, own, tested)
    pictures = _without(pictures, fit, config)
    training = {
        task: [p for p in pictures if np.isin(p.objects.labels, list(tasks.of(task))).any()]
        for task in range(1, len(tasks.classes) + 1)
    }
    for task, found in training.items():
        if not found:
            names = ", ".join(tasks.classes[task - 1])
            left = " and is not held out for the fit of energies" if fit else ""
            raise ConfigError(
                f"{train.file}: no picture has a class of task {task} ({names}){left}"
            )
    return OpenWorldData(
        tasks,
        training,
        {},
        tested,
        fit,
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
    counts = {data.train: data.train_pictures, data.val: data.val_pictures}
    with _whole(folder) as written:
        _write(written, counts, data.side, seed=0)
        (written / mark.name).write_text(about)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder that gets its name at the end, so that a killed process leaves none of it."""
    written = folder.with_name(f".{folder.name}.partial")
    disk.remove(written)
    yield written
    written.rename(folder)


def _write(folder: Path, counts: dict[str, int], side: int, *, seed: int) -> None:
    sides = (max(12, side // 5), max(14, side * 9 // 20))
    composed.write_coco(folder, counts, size=(side, side), objects=(1, 4), sides=sides, seed=seed)


def _own_split(config: Config, folder: Path, names: tuple[str, ...]) -> DetectionSet | None:
    """The pictures of `data.fit`, or composed ones; None if training pictures are held out."""
    data, split = config.data, config.data.fit
    if config.method.energy == "off":
        return None
    if data.format == "digits":
        split, folder = "fit", folder / f"fit_{config.method.fit_pictures}"
        if not folder.is_dir():
            with _whole(folder) as written:
                # Another seed than that of the training pictures.
                _write(written, {split: config.method.fit_pictures}, data.side, seed=1)
    if split is None:
        return None
    if data.format == "voc":
        return voc.load(folder, split, classes=names)
    found = coco.load(folder / f"annotations/instances_{split}.json", folder / split)
    if found.names != names:
        raise ConfigError(f"{found.file}: categories differ from those of {data.train}")
    return found


def fit_pictures(
    config: Config, training: list[Picture], own: list[Picture] | None, test: list[Picture]
) -> list[Picture]:
    """The pictures for the fit of energies: `method.fit_pictures` at most, a draw by the seed.

    Args:
        config: of the run; with `method.energy=off` there are none.
        training: all training pictures, each once.
        own: pictures of `data.fit`; None draws from the training pictures.
        test: test pictures, which the fit may not have.
    Raises:
        ConfigError: the fit would take more than half of the training pictures or a test picture.
    """
    method = config.method
    if method.energy == "off":
        return []
    if own is None and 2 * method.fit_pictures > len(training):
        raise ConfigError(
            f"method.fit_pictures={method.fit_pictures} must be at most half of the "
            f"{len(training)} training pictures, from which they are held out"
        )
    pool = training if own is None else list({p.path: p for p in own}.values())
    tested = {p.path for p in test}
    both = sum(p.path in tested for p in pool)
    if both:
        where = "data.train" if own is None else f"data.fit={config.data.fit}"
        raise ConfigError(f"{where} has {both} test pictures; energies are fitted on others")
    generator = torch.Generator().manual_seed(config.train.seed)
    order = torch.randperm(len(pool), generator=generator)[: method.fit_pictures]
    return [pool[index] for index in sorted(order.tolist())]


def _without(pictures: list[Picture], fit: list[Picture], config: Config) -> list[Picture]:
    """Training pictures that the fit does not have; all of them with `data.fit_trained`."""
    if config.data.fit_trained:
        return pictures
    held_out = {picture.path for picture in fit}
    return [picture for picture in pictures if picture.path not in held_out]


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
    replay = {t: [every[i] for i in listed(f"t{t}_ft")] for t in range(2, count + 1)}
    test = [every[i] for i in listed(data.test)]
    own = [every[i] for i in listed(data.fit)] if data.fit else None
    once = list({p.path: p for found in training.values() for p in found}.values())
    fit = fit_pictures(config, once, own, test)
    training = {t: _without(found, fit, config) for t, found in training.items()}
    paths = {id(p) for name, p in every.items() if name.startswith("voc")}
    return OpenWorldData(
        tasks,
        training,
        {t: [p.path for p in _without(found, fit, config)] for t, found in replay.items()},
        test,
        fit,
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
