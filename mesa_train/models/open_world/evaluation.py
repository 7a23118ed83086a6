"""Metrics of the open-world benchmark: mAP, wilderness impact, A-OSE, recall of unknowns.

Conventions that differ between papers are arguments or are reported side by side: the AP over all
points (ORE, RandBox) and over 11 points (OW-DETR, PROB), the two forms of the wilderness impact,
images that the official test list has twice, and the detections per image that A-OSE grows with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .matching import ClassMatches, Images, Matches, match

RECALLS = tuple(tenth / 10 for tenth in range(1, 10))
DEFINITIONS = ("official_code", "paper")


def average_precision(matches: ClassMatches, *, points: str = "all") -> float:
    """The average precision of a class, 0 to 1.

    Args:
        matches: of the class.
        points: "all" (default): the area under the precision envelope, or "11": the mean of the
            envelope at recalls 0, 0.1, ..., 1.
    Returns:
        NaN if the class has no objects.
    Raises:
        ValueError: points is neither.
    """
    if points not in ("all", "11"):
        raise ValueError(f"points must be one of all, 11, got {points!r}")
    if not matches.positives:
        return math.nan
    recall, precision = matches.recall, matches.precision
    if points == "11":
        highest = [precision[recall >= tenth / 10].max(initial=0.0) for tenth in range(11)]
        return float(np.mean(highest))
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(envelope[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[steps + 1] - recall[steps]) * envelope[steps + 1]).sum())


def wilderness_impact(
    detections: Images | Matches,
    targets: Images | None = None,
    *,
    recall: float = 0.8,
    definition: str = "official_code",
    **options: Any,
) -> float:
    """The wilderness impact: how much unknown objects lower the precision of known classes.

    Each known class contributes its detections up to the first one whose recall is nearest to
    `recall`. F is the mean number of detections that overlap an unknown object, and N the mean
    number of true and false positives.

    Args:
        detections: per image (see `matching.match`), or the `Matches` of a test set.
        targets: per image; None with `Matches`.
        recall: default 0.8.
        definition: "official_code" (default): F / N. "paper": P_known / P_all - 1 = F / (N - F).
        options: of `matching.match`: known, unknown, ...
    Returns:
        A number from 0; NaN if no known class has objects and detections.
    Raises:
        ValueError: definition is neither, or see `matching.match`.
    Source: arXiv 2103.02603, equation 3; github.com/JosephKJ/OWOD.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    fp_open, tp_plus_fp = wilderness_terms(_matches(detections, targets, options), recall)
    if not len(tp_plus_fp):
        return math.nan
    above, below = float(np.mean(fp_open)), float(np.mean(tp_plus_fp))
    if definition == "paper":
        below -= above
    return above / below if below > 0 else math.nan


def wilderness_terms(matches: Matches, recall: float) -> tuple[list[float], list[float]]:
    """(open-set detections, true and false positives) of each known class at a recall."""
    fp_open, tp_plus_fp = [], []
    for label in range(matches.known):
        of_class = matches.classes[label]
        index = of_class.at_recall(recall)
        if index is not None:
            fp_open.append(float(of_class.open_set[: index + 1].sum()))
            tp_plus_fp.append(float((of_class.true + of_class.false)[: index + 1].sum()))
    return fp_open, tp_plus_fp


def absolute_open_set_error(
    detections: Images | Matches, targets: Images | None = None, **options: Any
) -> int:
    """A-OSE: detections labelled as a class that overlap an unknown object with IoU above 0.5.

    It counts detections, not objects, so it grows with the number of detections per image.

    Args:
        detections: per image (see `matching.match`), or the `Matches` of a test set.
        targets: per image; None with `Matches`.
        options: of `matching.match`: known, unknown, ...
    Source: arXiv 2103.02603, section 5.1; github.com/JosephKJ/OWOD.
    """
    matches = _matches(detections, targets, options)
    return int(sum(errors for errors in open_set_errors(matches).values()))


def open_set_errors(matches: Matches) -> dict[int, int]:
    """A-OSE by the label of the detections; 0 for the label of unknowns."""
    return {
        label: 0 if label == matches.unknown else int(of_class.open_set.sum())
        for label, of_class in matches.classes.items()
    }


@dataclasses.dataclass(frozen=True)
class OpenWorldResult:
    """Metrics of a test set. Shares are from 0 to 1; NaN if a metric is not defined.

    Attributes:
        map_previous, map_current, map_known: mean AP over the classes of earlier tasks, of this
            task, and of both. Classes without objects are left out.
        points: "all" or "11", the convention of every AP here.
        unknown_recall, unknown_ap: of unknown objects; NaN without any.
        aose: the absolute open-set error, in detections.
        wilderness: by recall 0.1 to 0.9, as the official code computes it.
        wilderness_paper: the same as the paper defines it.
        ap, recall, precision: by label, at the end of the detections.
        aose_by_class: by label.
        unknown_precision: of the label unknown, by recall 0.1 to 0.9.
        unknown_objects: those that are not difficult.
        images: evaluated images; `repeated` further ones of the list were left out.
        detections_per_image: mean number.
    """

    map_previous: float
    map_current: float
    map_known: float
    points: str
    unknown_recall: float
    unknown_ap: float
    aose: int
    wilderness: dict[float, float]
    wilderness_paper: dict[float, float]
    ap: dict[int, float]
    recall: dict[int, float]
    precision: dict[int, float]
    aose_by_class: dict[int, int]
    unknown_precision: dict[float, float]
    unknown_objects: int
    images: int
    repeated: int
    detections_per_image: float

    @property
    def wi(self) -> float:
        """The wilderness impact at recall 0.8, as the official code computes it."""
        return self.wilderness[0.8]

    def row(self) -> dict[str, Any]:
        """The main numbers, for a row of a table; None for those that are not defined."""
        values = {
            "map_previous": self.map_previous,
            "map_current": self.map_current,
            "map_known": self.map_known,
            "points": self.points,
            "unknown_recall": self.unknown_recall,
            "unknown_ap": self.unknown_ap,
            "aose": self.aose,
            "wi": self.wi,
            "wi_paper": self.wilderness_paper[0.8],
            "unknown_objects": self.unknown_objects,
            "images": self.images,
            "repeated": self.repeated,
            "detections_per_image": self.detections_per_image,
        }
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in values.items()
        }


def open_world_evaluation(
    detections: Images,
    targets: Images,
    *,
    known: int,
    unknown: int,
    previous: int = 0,
    points: str = "all",
    image_ids: Sequence[Any] | None = None,
    repeated: str = "drop",
    rounded: bool = False,
    ties: str = "numpy",
) -> OpenWorldResult:
    """Evaluate the detections of a test set.

    Args:
        detections: per image: "boxes" (N, 4), "labels" (N,), "scores" (N,).
        targets: per image: "boxes" (M, 4), "labels" (M,) and perhaps "difficult" (M,). Objects of
            label `known` or higher are unknown.
        known: number of known classes, those of earlier tasks first.
        unknown: label of unknown detections.
        previous: number of classes of earlier tasks; default 0.
        points: "all" (default) or "11", see `average_precision`.
        image_ids, repeated, rounded, ties: see `matching.match`.
    Raises:
        ValueError: previous is out of range; see `matching.match`.
    """
    if not 0 <= previous <= known:
        raise ValueError(f"previous must lie in 0 to known={known}, got {previous}")
    matches = match(
        detections,
        targets,
        known=known,
        unknown=unknown,
        image_ids=image_ids,
        repeated=repeated,
        rounded=rounded,
        ties=ties,
    )
    classes = matches.classes
    ap = {label: average_precision(found, points=points) for label, found in classes.items()}
    of_unknown = classes[unknown]
    at = {r: of_unknown.at_recall(r) for r in RECALLS}
    return OpenWorldResult(
        map_previous=_mean(ap[label] for label in range(previous)),
        map_current=_mean(ap[label] for label in range(previous, known)),
        map_known=_mean(ap[label] for label in range(known)),
        points=points,
        unknown_recall=_last(of_unknown, "recall"),
        unknown_ap=ap[unknown],
        aose=absolute_open_set_error(matches),
        wilderness={r: wilderness_impact(matches, recall=r) for r in RECALLS},
        wilderness_paper={
            r: wilderness_impact(matches, recall=r, definition="paper") for r in RECALLS
        },
        ap=ap,
        recall={label: _last(found, "recall") for label, found in classes.items()},
        precision={label: _last(found, "precision") for label, found in classes.items()},
        aose_by_class=open_set_errors(matches),
        unknown_precision={
            r: math.nan if index is None else float(of_unknown.precision[index])
            for r, index in at.items()
        },
        unknown_objects=of_unknown.positives,
        images=matches.images,
        repeated=matches.repeated,
        detections_per_image=matches.detections / max(1, matches.images),
    )


def _matches(
    detections: Images | Matches, targets: Images | None, options: dict[str, Any]
) -> Matches:
    if isinstance(detections, Matches):
        return detections
    if targets is None:
        raise ValueError("targets are needed with detections")
    return match(detections, targets, **options)


def _last(matches: ClassMatches, field: str) -> float:
    """The final recall or precision; recall 0 without detections, NaN without objects."""
    values = getattr(matches, field)
    if len(values):
        return float(values[-1])
    return 0.0 if matches.positives or field == "precision" else math.nan


def _mean(values: Iterable[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan
