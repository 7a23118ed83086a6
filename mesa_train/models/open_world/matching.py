"""Match detections to objects as the VOC evaluation of the open-world benchmark does.

Detections of a class, over all images, go from the highest score to the lowest. A detection is a
true positive if its best object of that class has an IoU above 0.5, is not difficult and is not
taken. A detection whose best object is difficult counts neither way. Classes that are not known
count as unknown objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Images = Sequence[Mapping[str, Any]]
SORTS: dict[str, Any] = {"numpy": "quicksort", "listed": "stable"}
_FIELDS = {"detections": ("boxes", "labels", "scores"), "targets": ("boxes", "labels")}


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """The detections of a class, highest score first.

    Attributes:
        scores: (N,).
        true: 1 for true positives, (N,).
        false: 1 for false positives, (N,).
        open_set: 1 for detections that overlap an unknown object with IoU above 0.5, (N,).
        positives: objects of the class that are not difficult.
    """

    scores: Floats
    true: Floats
    false: Floats
    open_set: Floats
    positives: int

    @property
    def recall(self) -> Floats:
        """Recall after each detection; NaN without objects."""
        if not self.positives:
            return np.full(len(self.true), np.nan)
        return self.true.cumsum() / self.positives

    @property
    def precision(self) -> Floats:
        """Precision after each detection."""
        true, false = self.true.cumsum(), self.false.cumsum()
        return true / np.maximum(true + false, np.finfo(np.float64).eps)

    def at_recall(self, recall: float) -> int | None:
        """The first index whose recall is nearest to `recall`; None without objects or detections."""
        if not self.positives or not len(self.true):
            return None
        return int(np.abs(self.recall - recall).argmin())


@dataclasses.dataclass(frozen=True)
class Matches:
    """The matches of all classes.

    Attributes:
        classes: matches by label.
        known: number of known classes.
        unknown: label of unknown objects.
        images: evaluated images.
        detections: detections in them.
        repeated: images of the list that were left out as repetitions.
    """

    classes: Mapping[int, ClassMatches]
    known: int
    unknown: int
    images: int
    detections: int
    repeated: int


def match(
    detections: Images,
    targets: Images,
    *,
    known: int,
    unknown: int,
    image_ids: Sequence[Any] | None = None,
    repeated: str = "drop",
    rounded: bool = False,
    ties: str = "numpy",
) -> Matches:
    """Match the detections of a test set.

    Args:
        detections: per image: "boxes" (N, 4) as (x1, y1, x2, y2) in pixels from 0, "labels" (N,),
            "scores" (N,). Tensors or arrays.
        targets: per image: "boxes" (M, 4), "labels" (M,) and, if there are any, "difficult" (M,).
            An object whose label is `known` or higher is unknown.
        known: number of known classes; their labels are 0 to known - 1.
        unknown: label of unknown detections.
        image_ids: of the images, if an image may be listed twice.
        repeated: a listed image that occurred before is left out ("drop", default) or counted as
            the official evaluation does ("count"): its objects count again as positives, but
            detections of both listings share one set of objects, so the second ones are false.
        rounded: round scores to 3 decimals and boxes to 1, as the official result files; default
            false.
        ties: order of detections with equal scores: "numpy" (default; numpy's unstable sort, as the
            official evaluation, which may depend on the processor) or "listed".
    Returns:
        The matches by class.
    Raises:
        ValueError: names the image and the field that is missing or has another shape, or the
            choices of an argument.
    """
    if repeated not in ("drop", "count"):
        raise ValueError(f"repeated must be one of drop, count, got {repeated!r}")
    if ties not in SORTS:
        raise ValueError(f"ties must be one of {', '.join(SORTS)}, got {ties!r}")
    if not 1 <= known <= unknown:
        raise ValueError(f"known must lie in 1 to unknown={unknown}, got {known}")
    if len(detections) != len(targets):
        raise ValueError(f"got detections of {len(detections)} images and {len(targets)} targets")
    ids = list(range(len(targets)) if image_ids is None else image_ids)
    if len(ids) != len(targets):
        raise ValueError(f"got {len(ids)} image_ids and {len(targets)} targets")
    places: dict[Any, int] = {}
    listed = [
        index
        for index, name in enumerate(ids)
        if places.setdefault(name, index) == index or repeated == "count"
    ]
    truth = {i: _Objects(targets[i], i, known, unknown) for i in set(places.values())}
    found: list[tuple[int, NDArray[Any]]] = []
    for index in listed:
        found.append((places[ids[index]], _table(detections[index], index, rounded)))
    owners = [truth[places[ids[index]]] for index in listed]
    table = np.concatenate([rows for _, rows in found]) if found else np.zeros((0, 6))
    images = np.repeat([place for place, _ in found], [len(rows) for _, rows in found]).astype(int)
    labels = {*range(known), unknown, *table[:, 5].astype(int).tolist()}
    classes = {}
    for label in sorted(labels):
        chosen = table[:, 5] == label
        positives = sum(owner.positives(label) for owner in owners)
        rows, places_of = table[chosen], images[chosen]
        order = np.argsort(-rows[:, 4], kind=SORTS[ties])
        classes[label] = _match(label, rows[order], places_of[order], truth, positives)
    return Matches(
        classes,
        known,
        unknown,
        len(listed),
        len(table),
        len(ids) - len(listed),
    )


class _Objects:
    """The objects of an image."""

    def __init__(self, target: Mapping[str, Any], index: int, known: int, unknown: int) -> None:
        boxes, labels = _arrays(target, "targets", index)
        self.boxes = boxes
        self.labels = np.where(labels < known, labels, unknown).astype(int)
        difficult = target.get("difficult")
        empty = np.zeros(len(labels), bool)
        self.difficult = empty if difficult is None else _array(difficult).astype(bool)
        self.unknown_boxes = boxes[self.labels == unknown]

    def positives(self, label: int) -> int:
        """Objects of a class that are not difficult."""
        return int(((self.labels == label) & ~self.difficult).sum())


def _match(
    label: int, rows: Floats, images: NDArray[Any], truth: Mapping[int, _Objects], positives: int
) -> ClassMatches:
    true, false, open_set = np.zeros((3, len(rows)))
    taken: dict[int, NDArray[Any]] = {}
    for index, (row, image) in enumerate(zip(rows, images, strict=True)):
        objects = truth[int(image)]
        of_class = objects.labels == label
        if len(objects.unknown_boxes):
            open_set[index] = ious(objects.unknown_boxes, row[:4]).max() > 0.5
        overlaps = ious(objects.boxes[of_class], row[:4])
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or not overlaps[best] > 0.5:
            false[index] = 1
        elif not objects.difficult[of_class][best]:
            used = taken.setdefault(int(image), np.zeros(len(overlaps), bool))
            (false if used[best] else true)[index] = 1
            used[best] = True
    return ClassMatches(rows[:, 4], true, false, open_set, positives)


def ious(boxes: Floats, box: Floats) -> Floats:
    """IoU of boxes (N, 4) with a box (4,), in pixels from 0."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    inner = np.clip(high - low, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    own = (box[2:] - box[:2]).prod()
    return inner / np.maximum(areas + own - inner, np.finfo(np.float64).tiny)


def _table(detection: Mapping[str, Any], index: int, rounded: bool) -> Floats:
    """Detections of an image as rows (x1, y1, x2, y2, score, label)."""
    boxes, labels = _arrays(detection, "detections", index)
    scores = _array(detection["scores"]).astype(np.float64)
    if rounded:
        boxes, scores = boxes.round(1), scores.round(3)
    return np.concatenate([boxes, scores[:, None], labels[:, None]], 1)


def _arrays(image: Mapping[str, Any], name: str, index: int) -> tuple[Floats, NDArray[Any]]:
    for field in _FIELDS[name]:
        if field not in image:
            raise ValueError(f"{name}[{index}] has no {field!r}")
    boxes = _array(image["boxes"]).astype(np.float64).reshape(-1, 4)
    for field in (*_FIELDS[name][1:], "difficult"):
        if field in image and len(_array(image[field])) != len(boxes):
            raise ValueError(
                f"{name}[{index}] has {len(boxes)} boxes and {len(_array(image[field]))} {field}"
            )
    return boxes, _array(image["labels"]).astype(int)


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
