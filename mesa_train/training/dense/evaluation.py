"""COCO's average precision of boxes and masks, by pycocotools.

The metric is COCO's: the mean over classes and over IoUs from 0.50 to 0.95 of the precision at 101
recalls, 100 detections per picture. Detections on ignored objects do not count. Mean IoU of
segmentation is in `mesa_train.training.evaluation.segmentation`.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .annotations import DetectionSet
from .run_lengths import encode, merged

# COCOeval's first six numbers.
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def detections_of(data: DetectionSet, index: int, output: Mapping[str, Tensor]) -> list[Any]:
    """COCO's result entries of one picture.

    Args:
        data: the split.
        index: of the picture.
        output: of the model: "boxes" (N, 4), "labels" (N,) from 0, "scores" (N,), and optionally
            "masks" (N, 1, H, W), boolean.
    Returns:
        An entry for each detection, of plain values: image_id, category_id, score, bbox, and
        optionally segmentation as run lengths.
    """
    boxes = output["boxes"].detach().float().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    shared = {"image_id": data.pictures[index].id}
    found = [
        {**shared, "category_id": data.category_ids[label], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True
        )
    ]
    if "masks" in output:
        for entry, mask in zip(found, output["masks"][:, 0].cpu().numpy(), strict=True):
            entry["segmentation"] = encode(mask)
    return found


def average_precision(
    data: DetectionSet,
    detections: Sequence[Mapping[str, Any]],
    *,
    masks: bool = False,
    classes: bool = False,
) -> dict[str, float]:
    """Average precision of detections on a whole split.

    Args:
        data: the split. Pictures without objects count too.
        detections: entries of `detections_of`. Several entries of one picture are its detections.
        masks: also compare masks; default false. The split then needs segmentations.
        classes: also give a number for each class; default false.
    Returns:
        "ap", "ap50", "ap75", "ap_small", "ap_medium" and "ap_large" of boxes, the same with the
        prefix "mask_", and with `classes` "ap.NAME". A number is nan if the split has no such
        object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    scores: dict[str, float] = {}
    # pycocotools prints; a library does not.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # pycocotools warns about its own use of NumPy.
        warnings.simplefilter("ignore", DeprecationWarning)
        truth = COCO()
        truth.dataset = _dataset(data, masks)
        truth.createIndex()
        for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + masks]:
            entries = [dict(entry) for entry in detections]
            if kind == "segm":
                # With boxes, pycocotools would take the boxes' areas for the masks'.
                for entry in entries:
                    entry.pop("bbox")
            found = truth.loadRes(entries) if entries else _empty(truth)
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats = evaluation.stats[: len(NAMES)]
            scores |= {prefix + n: _number(v) for n, v in zip(NAMES, stats, strict=True)}
            if classes:
                scores |= _by_class(data, evaluation, prefix)
    return scores


def _dataset(data: DetectionSet, masks: bool) -> dict[str, Any]:
    """The split as COCO's lists, with annotation ids from 1: pycocotools takes 0 for no match."""
    images, annotations = [], list[dict[str, Any]]()
    for picture in data.pictures:
        objects = picture.objects
        size = {"height": objects.height, "width": objects.width}
        images.append({"id": picture.id, **size})
        for index, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            entry = {
                "id": len(annotations) + 1,
                "image_id": picture.id,
                "category_id": data.category_ids[int(objects.labels[index])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(objects.areas[index]),
                "iscrowd": int(objects.ignored[index]),
            }
            if masks:
                assert objects.segmentations is not None
                shape = objects.segmentations[index]
                # Polygons of fewer than three points were left out.
                sides = objects.height, objects.width
                entry["segmentation"] = merged(shape, *sides) if shape else encode(np.zeros(sides))
            annotations.append(entry)
    categories = [
        {"id": key, "name": name} for key, name in zip(data.category_ids, data.names, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _empty(truth: Any) -> Any:
    """Results without detections; pycocotools' reader needs at least one."""
    from pycocotools.coco import COCO

    found = COCO()
    kept = {key: truth.dataset[key] for key in ("images", "categories")}
    found.dataset = kept | {"annotations": []}
    found.createIndex()
    return found


def _by_class(data: DetectionSet, evaluation: Any, prefix: str) -> dict[str, float]:
    """Average precision of each class over all areas."""
    # (IoUs, recalls, classes, areas, numbers of detections); -1 where there is no object.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    found = {}
    for label, name in enumerate(data.names):
        own = precision[:, :, label]
        found[f"{prefix}ap.{name}"] = float(own.mean()) if own.min() >= 0 else math.nan
    return found


def _number(value: float) -> float:
    """A number of COCOeval; its -1 means that there is no such object."""
    return math.nan if value < 0 else float(value)
