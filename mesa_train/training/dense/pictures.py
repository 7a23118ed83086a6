"""Pictures with labels and predictions, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .loader import read_picture
from .run import DenseRun
from .tasks import Detection, Segmentation

# Height of a picture in the sheet, in pixels.
_HEIGHT = 240
# Detections below this score are not drawn.
_LEAST_SCORE = 0.3


@torch.no_grad()
def draw(run: DenseRun, path: Path, count: int) -> None:
    """Write a sheet of validation pictures: the labels on the left, the predictions on the right.

    Args:
        run: its model predicts; one process draws.
        path: of the sheet, a png file.
        count: number of pictures, from the split's beginning.
    """
    task, model = run.task, run.bare.eval()
    rows = []
    for batch, _ in zip(run.loader.validation(task.count), range(count), strict=False):
        if isinstance(task, Detection):
            rows.append(_detection(task, batch.indices[0], task.outputs(model, batch, run.device)))
        elif isinstance(task, Segmentation):
            rows.append(_maps(task, batch, task.outputs(model, batch, run.device)))
    model.train()
    if rows:
        save(rows, path)


def save(rows: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """Write pairs of pictures (3, H, W) in two columns of pairs."""
    pairs = [np.concatenate([_scaled(left), _scaled(right)], 1) for left, right in rows]
    width = max(pair.shape[1] for pair in pairs)
    padded = [np.pad(p, ((4, 4), (4, width - p.shape[1] + 4), (0, 0))) for p in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(padded)).save(path)


def _scaled(picture: Tensor) -> Any:
    height, width = picture.shape[1:]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    return np.asarray(image.resize((max(1, round(width * _HEIGHT / height)), _HEIGHT)))


def _detection(task: Detection, index: int, outputs: list[dict[str, Tensor]]) -> Any:
    """(picture with its objects, picture with its detections)."""
    picture = task.val_set.pictures[index]
    image, objects = read_picture(picture.path).as_subclass(Tensor), picture.objects
    output = {key: value.cpu() for key, value in outputs[0].items()}
    drawn = output["scores"] >= _LEAST_SCORE
    labels = torch.from_numpy(objects.labels[objects.trained])
    truth = boxes_on(image, torch.from_numpy(objects.targets()), [task.names[i] for i in labels])
    texts = [
        f"{task.names[label]} {score:.2f}"
        for label, score in zip(
            output["labels"][drawn].tolist(), output["scores"][drawn].tolist(), strict=True
        )
    ]
    masks = output["masks"][drawn][:, 0] if "masks" in output else None
    return truth, boxes_on(image, output["boxes"][drawn], texts, masks)


def boxes_on(image: Tensor, boxes: Tensor, texts: list[str], masks: Tensor | None = None) -> Tensor:
    """A picture (3, H, W) with boxes (N, 4), a text each, and masks (N, H, W)."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    if not len(boxes):
        return image
    colours = [_colour(i) for i in range(len(boxes))]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool(), alpha=0.5, colors=colours)
    return draw_bounding_boxes(image, boxes, texts, colors=colours, width=1)


def _maps(task: Segmentation, batch: Any, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(picture under its map, picture under the predicted map)."""
    image = read_picture(task.val_set.pairs[batch.indices[0]][0]).as_subclass(Tensor)
    labels = batch.targets[0]["map"].reshape(image.shape[1:])
    return _under(image, labels), _under(image, outputs[0].cpu())


def _under(image: Tensor, labels: Tensor) -> Tensor:
    """A picture blended with a colour for each class. Ignored pixels stay black."""
    palette = torch.tensor([_colour(label) for label in range(256)], dtype=torch.uint8)
    colours = palette[labels.clamp(max=255).long()].permute(2, 0, 1)
    colours = torch.where(labels == 255, torch.zeros_like(colours), colours)
    return (image.float() * 0.4 + colours.float() * 0.6).to(torch.uint8)


def _colour(index: int) -> tuple[int, int, int]:
    """A colour for an index; neighbours differ."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.75, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)
