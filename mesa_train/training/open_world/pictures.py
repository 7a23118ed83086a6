"""Test pictures with their objects on the left and the detections on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mesa_train.training.dense.loader import read_picture
from mesa_train.training.dense.pictures import save

from .run import OpenWorldRun

# Detections below this score are not drawn.
LEAST_SCORE = 0.3
# Known objects and unknown ones.
_KNOWN, _UNKNOWN = (0, 190, 255), (255, 60, 60)


def draw(
    run: OpenWorldRun, detections: Sequence[dict[str, Tensor]], path: Path, count: int
) -> None:
    """Write a sheet of test pictures.

    Known boxes are blue and have the class's name, unknown ones are red.

    Args:
        run: of the detections.
        detections: of all test pictures.
        path: of the sheet, a png file.
        count: number of pictures, from the beginning.
    """
    rows = []
    for picture, output in list(zip(run.data.test, detections, strict=True))[:count]:
        image = read_picture(picture.path).as_subclass(Tensor)
        objects = picture.objects
        truth = marked(
            image, torch.from_numpy(objects.boxes), objects.labels.tolist(), run.data.tasks.names,
            run.model.seen,
        )  # fmt: skip
        drawn = output["scores"] >= LEAST_SCORE
        found = marked(
            image, output["boxes"][drawn], output["labels"][drawn].tolist(), run.data.tasks.names,
            run.model.seen,
        )  # fmt: skip
        rows.append((truth, found))
    if rows:
        save(rows, path)


def marked(
    image: Tensor, boxes: Tensor, labels: Sequence[int], names: Sequence[str], seen: int
) -> Any:
    """A picture (3, H, W) with boxes (N, 4): known ones with their names, others as unknown."""
    from torchvision.utils import draw_bounding_boxes

    if not len(boxes):
        return image
    known = [label < seen for label in labels]
    texts = [
        names[label] if is_known else "unknown"
        for label, is_known in zip(labels, known, strict=True)
    ]
    colours = [_KNOWN if is_known else _UNKNOWN for is_known in known]
    return draw_bounding_boxes(image, boxes, texts, colors=colours, width=1)


def save_one(image: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) of bytes."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
