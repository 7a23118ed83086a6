"""The two tasks of the dense recipes: detection and segmentation.

A task opens the data, turns batches into a model's inputs, and scores predictions. `run.py` trains
both alike.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesa_train.training import disk
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.evaluation.segmentation import confusion_matrix, segmentation_scores

from . import coco, composed, maps, tables, transforms, voc
from .annotations import DetectionSet
from .config import Config, DataConfig
from .evaluation import average_precision, detections_of
from .loader import Batch, DetectionSamples, SegmentationSamples

_log = logging.getLogger(__name__)
Scores = dict[str, float]
_ANNOTATIONS = "annotations/instances_{}.json"


class Task(abc.ABC):
    """The data and the metric of a run.

    Attributes:
        names: of the classes, by label.
        train, val: samples.
        groups: of the training pictures, see `loader.micro_batches`.
        count: of validation pictures.
        metric: name of the score that decides which weights are the best.
        fill: the last micro-batches of an epoch are completed.
    """

    names: tuple[str, ...]
    train: Any
    val: Any
    groups: NDArray[Any]
    count: int
    metric: str
    fill: bool

    @abc.abstractmethod
    def losses(self, model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The losses of a micro-batch; their sum is the loss."""

    @abc.abstractmethod
    def predict(self, model: Any, batch: Batch, device: torch.device) -> list[Any]:
        """What `scores` needs of a validation batch: plain values."""

    @abc.abstractmethod
    def scores(self, predictions: list[Any]) -> Scores:
        """The scores of all validation pictures."""


def task_of(config: Config) -> Task:
    """Open the data of a configuration.

    Raises:
        ConfigError: in one line, the file, the field and its value.
    """
    if config.data.format == "digits":
        _compose(config)
    return Detection(config) if config.model.detects else Segmentation(config)


class Detection(Task):
    """Boxes, and masks with a Mask R-CNN."""

    def __init__(self, config: Config) -> None:
        self.masks = config.model.kind == "mask_rcnn"
        train, self.val_set = _detection_sets(config.data, masks=self.masks)
        self.train_set = train.for_training(config.data.smallest)
        if all(picture.objects.ignored.all() for picture in self.val_set.pictures):
            _log.warning("%s: no object to score; evaluations have no score", self.val_set.file)
        self.names = _named(config, train.names)
        self.metric, self.fill = "mask_ap" if self.masks else "ap", True
        seed = config.train.seed
        transform = transforms.detection(config.data, config.augment)
        self.train = DetectionSamples(self.train_set, transform, seed, masks=self.masks)
        self.val = DetectionSamples(self.val_set, None, seed, masks=False)
        self.count = len(self.val_set.pictures)
        objects = [picture.objects for picture in self.train_set.pictures]
        wide = [config.data.by_aspect and x.width > x.height for x in objects]
        self.groups = np.array(wide, np.int64)

    def losses(self, model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The detector's losses."""
        first = first_label(model)
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for target in batch.targets
        ]
        for target in targets:
            target["labels"] = target["labels"] + first
        found: dict[str, Tensor] = model(_floats(batch.images, device), targets)
        return found

    def outputs(self, model: Any, batch: Batch, device: torch.device) -> list[dict[str, Tensor]]:
        """Detections of each picture, with labels from 0 and boolean masks."""
        first, found = first_label(model), []
        for output in model(_floats(batch.images, device)):
            output["labels"] = output["labels"] - first
            if "masks" in output and output["masks"].dtype != torch.bool:
                output["masks"] = output["masks"] >= 0.5
            found.append(output)
        return found

    def predict(self, model: Any, batch: Batch, device: torch.device) -> list[Any]:
        """COCO's result entries."""
        outputs = self.outputs(model, batch, device)
        pairs = zip(batch.indices, outputs, strict=True)
        return [entry for i, output in pairs for entry in detections_of(self.val_set, i, output)]

    def scores(self, predictions: list[Any]) -> Scores:
        """Average precision of boxes, and of masks."""
        return average_precision(self.val_set, predictions, masks=self.masks)


class Segmentation(Task):
    """Classes of pixels."""

    def __init__(self, config: Config) -> None:
        train, self.val_set = _map_sets(config.data)
        named = train.names
        if named is None:
            if config.model.classes is None:
                raise ConfigError(
                    f"model.classes is missing: {config.data.path} has no classes.txt to count"
                )
            named = tuple(f"class {label}" for label in range(config.model.classes))
        self.names = _named(config, named)
        self.metric, self.fill = "miou", False
        classes, seed = len(self.names), config.train.seed
        transform = transforms.segmentation(config.data, config.augment)
        self.train = SegmentationSamples(train, classes, transform, seed)
        self.val = SegmentationSamples(self.val_set, classes, transforms.whole(config.data), seed)
        self.count = len(self.val_set.pairs)
        self.groups = np.zeros(len(train.pairs), np.int64)

    def losses(self, model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The segmenter's loss."""
        images = torch.stack(batch.images).to(device, non_blocking=True)
        labels = torch.stack([target["map"] for target in batch.targets])
        found: dict[str, Tensor] = model(images, labels.to(device, non_blocking=True))
        return found

    def outputs(self, model: Any, batch: Batch, device: torch.device) -> list[Tensor]:
        """The class map (H, W) of each picture, at the size of its labels."""
        return [
            model.predict(image[None].to(device), tuple(target["map"].shape[-2:]))[0]
            for image, target in zip(batch.images, batch.targets, strict=True)
        ]

    def predict(self, model: Any, batch: Batch, device: torch.device) -> list[Any]:
        """One confusion matrix."""
        pairs = zip(self.outputs(model, batch, device), batch.targets, strict=True)
        classes = len(self.names)
        return [sum(confusion_matrix(map_, t["map"], classes) for map_, t in pairs)]

    def scores(self, predictions: list[Any]) -> Scores:
        """mIoU, mean accuracy and pixel accuracy over the whole split."""
        found = segmentation_scores(sum(predictions))
        return {
            "miou": found.mean_iou,
            "mean_accuracy": found.mean_accuracy,
            "pixel_accuracy": found.pixel_accuracy,
        }


def first_label(model: Any) -> int:
    """The detector's label of the first class: 1 with torchvision's background, else 0."""
    module = getattr(model, "module", model)
    heads = getattr(module, "roi_heads", None)
    return 0 if heads is None else int(heads.labels.start)


def _floats(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Bytes to values from 0 to 1, on the device."""
    return [image.to(device, non_blocking=True).float() / 255 for image in images]


def _named(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    classes = config.model.classes
    if classes is not None and classes != len(names):
        some = f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        raise ConfigError(
            f"model.classes={classes}, but {config.data.path} has {len(names)}: {some}; set "
            f"model.classes={len(names)}"
        )
    return names


def _splits(data: DataConfig, train: str, val: str) -> tuple[str, str]:
    return data.train or train, data.val or val


def _detection_sets(data: DataConfig, *, masks: bool) -> tuple[DetectionSet, DetectionSet]:
    """(training, validation) of a detector."""
    folder = Path(str(data.path))
    if data.format == "voc":
        names = _splits(data, "train", "val")
        train = voc.load(folder, names[0])
        return train, voc.load(folder, names[1], classes=train.names)
    if data.format == "datasets":
        names = _splits(data, "train", "validation")
        options: dict[str, Any] = {"image_key": data.image_key, "objects_key": data.objects_key}
        options |= {"boxes": data.boxes, "masks": masks}
        train = tables.detection(str(data.path), names[0], **options)
        val = tables.detection(str(data.path), names[1], classes=train.names, **options)
        return _of_one_kind(train, val)
    default = ("train", "val") if data.format == "digits" else ("train2017", "val2017")
    train_name, val_name = _splits(data, *default)
    found = [
        coco.load(folder / (file or _ANNOTATIONS.format(name)), folder / name, masks=masks)
        for name, file in (
            (train_name, data.train_annotations),
            (val_name, data.val_annotations),
        )
    ]
    return _of_one_kind(*found)


def _of_one_kind(train: DetectionSet, val: DetectionSet) -> tuple[DetectionSet, DetectionSet]:
    """Both splits. ConfigError if their categories differ."""
    for field in ("category_ids", "names"):
        ours, theirs = getattr(train, field), getattr(val, field)
        if ours != theirs:
            pairs = zip((*ours, None), (*theirs, None), strict=False)
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise ConfigError(
                f"{val.file}: categories differ from {train.file}: {other!r} instead of {one!r}"
            )
    return train, val


def _map_sets(data: DataConfig) -> tuple[maps.MapSet, maps.MapSet]:
    """(training, validation) of a segmenter."""
    is_voc = data.format == "voc"
    zero = data.zero_ignored if data.zero_ignored is not None else not is_voc
    if data.format == "datasets":
        keys: dict[str, Any] = {"image_key": data.image_key, "map_key": data.map_key}
        sets = [
            tables.segmentation(str(data.path), split, zero_ignored=zero, **keys)
            for split in _splits(data, "train", "validation")
        ]
        return sets[0], sets[1]
    train, val = _splits(data, *(("train", "val") if is_voc else ("training", "validation")))
    options: dict[str, Any] = {"voc": is_voc, "zero_ignored": zero}
    return maps.load(str(data.path), train, **options), maps.load(str(data.path), val, **options)


def _compose(config: Config) -> None:
    """Write the composed pictures, if the folder does not hold those of this configuration."""
    data, folder = config.data, Path(str(config.data.path))
    size = (min(data.short_side, 427), min(data.long_side, 256))
    # RetinaNet's smallest anchors are 32 pixels wide; smaller digits would match few of them.
    sides = (size[0] // 2, size[0] * 3 // 4)
    about = {
        "pictures": [data.train_pictures, data.val_pictures],
        "digits": data.digits,
        "size": list(size),
        "sides": list(sides),
        "detects": config.model.detects,
    }
    mark = folder / "composed.txt"
    if mark.is_file():
        if mark.read_text() != f"{about}\n":
            raise ConfigError(
                f"data.path={folder} holds other pictures ({mark.read_text().strip()}); choose "
                "another folder"
            )
        return
    if folder.exists():
        raise ConfigError(
            f"data.path={folder} is no folder of composed pictures; choose a new folder"
        )
    # A process that is killed leaves a folder that is not used.
    written = folder.with_name(f".{folder.name}.partial")
    disk.remove(written)
    counts = (int(data.train_pictures or 0), data.val_pictures)
    names = ("train", "val") if config.model.detects else ("training", "validation")
    write = composed.write_coco if config.model.detects else composed.write_maps
    write(
        written,
        dict(zip(_splits(data, *names), counts, strict=True)),
        digits=[int(digit) for digit in data.digits],
        size=size,
        objects=(1, 3),
        sides=sides,
    )
    (written / mark.name).write_text(f"{about}\n")
    written.rename(folder)


def finite(scores: Scores) -> Scores:
    """Scores without nan, which JSON lacks."""
    return {name: value for name, value in scores.items() if not math.isnan(value)}


def with_classes(config: Config, classes: int) -> Config:
    """The configuration with the number of classes of the data."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, classes=classes))
